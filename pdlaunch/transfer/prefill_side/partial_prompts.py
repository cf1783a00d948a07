"""Tells decode ranks which blocks are ready of a prompt that is still being computed.

::

    offer ──> offer (more blocks) ──> .. ──┬─> lease, of the same generation
      ▲                                    └─> withdrawn: the blocks may be another request's
      └────────── a new generation ──────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.side_channel import GroupBlocks, PullReply
from pdlaunch.protocol.transfer import OfferPartialPrompt


@dataclass(frozen=True, slots=True)
class _PartialPrompt:
    command: OfferPartialPrompt
    generation: int
    version: int


class PartialPrompts:
    """Keeps what was offered and neither withdrawn nor leased. The transfer thread owns it."""

    def __init__(self) -> None:
        self._prompts: dict[LeaseId, _PartialPrompt] = {}
        self._num_offers = 0
        """Numbers all offers from 1 on, so that each generation and version has a name of its own;
        0 is that of a reader who knows of nothing, and of a lease that was never offered.
        """

    def offer(self, command: OfferPartialPrompt) -> None:
        """Take in more blocks of a prompt, or its first ones."""
        self._num_offers += 1
        earlier = self._prompts.get(command.lease_id)
        # Nothing is offered yet, or it was withdrawn since: what readers have of an earlier
        # generation does not count any more.
        generation = self._num_offers if earlier is None else earlier.generation
        self._prompts[command.lease_id] = _PartialPrompt(command, generation, self._num_offers)

    def end(self, lease_id: LeaseId) -> int:
        """Forget a prompt that is withdrawn or leased. Returns its generation, 0 if it was never
        offered.
        """
        ended = self._prompts.pop(lease_id, None)
        return 0 if ended is None else ended.generation

    def has_news(self, lease_id: LeaseId, version: int) -> bool:
        """Return whether there is more than a reader who knows of ``version`` has been told."""
        found = self._prompts.get(lease_id)
        return found is not None and found.version != version

    def reply(self, call_id: int, lease_id: LeaseId) -> PullReply:
        """Return what there is so far of a prompt that was offered."""
        found = self._prompts[lease_id]
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
