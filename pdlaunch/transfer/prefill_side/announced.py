"""Prompts that are being computed here and that readers may know of: their blocks so far.

::

    announce ──> announce (more blocks) ──> .. ──┬─> lease, of the same generation
         ▲                                       └─> withdrawn: the blocks may be another request's
         └────────── a new generation ───────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.side_channel import GroupBlocks, PullReply
from pdlaunch.protocol.transfer import AnnounceBlocks


@dataclass(frozen=True, slots=True)
class _Announcement:
    command: AnnounceBlocks
    generation: int
    version: int


class Announcements:
    """What has been announced and neither withdrawn nor leased. The transfer thread owns it."""

    def __init__(self) -> None:
        self._by_request: dict[LeaseId, _Announcement] = {}
        self._count = 0
        """Of all announcements: its values name generations and versions."""

    def announce(self, command: AnnounceBlocks) -> None:
        """More blocks of a prompt, or the first ones."""
        self._count += 1
        earlier = self._by_request.get(command.lease_id)
        generation = self._count if earlier is None else earlier.generation
        self._by_request[command.lease_id] = _Announcement(command, generation, self._count)

    def end(self, lease_id: LeaseId) -> int:
        """It is withdrawn, or leased; returns its generation, 0 of what was never announced."""
        ended = self._by_request.pop(lease_id, None)
        return 0 if ended is None else ended.generation

    def has_news(self, lease_id: LeaseId, version: int) -> bool:
        """For a reader that knows of this version."""
        found = self._by_request.get(lease_id)
        return found is not None and found.version != version

    def reply(self, call_id: int, lease_id: LeaseId) -> PullReply:
        """What there is so far; something was announced."""
        found = self._by_request[lease_id]
        command = found.command
        pairs = zip(command.first_block_index, command.block_ids, strict=True)
        return PullReply(
            call_id=call_id,
            num_tokens=command.num_tokens,
            block_hashes=command.block_hashes,
            groups=[
                GroupBlocks(first_block_index=first, block_ids=ids, checksums=None)
                for first, ids in pairs
            ],
            lease_s=0.0,
            leased=False,
            num_ready_blocks=command.num_ready_blocks,
            generation=found.generation,
            version=found.version,
        )
