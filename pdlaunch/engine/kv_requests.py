"""Leases and pulls of an engine: which blocks they own, and the commands that start and end them.

    lease   running ─ grant ─▶ leased ─ LeaseEnded ─▶ free
    pull    start ─▶ in flight ─┬─ ok ──────────────────────────▶ the request's
                                ├─ failed ──────────────────────▶ free
                                └─ failed, READ may still write ▶ quarantined ─ PullDrained ─▶ free

The ranks' transfer threads own every deadline. Each lease and each pull ends in exactly one event
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.kvcache.manager import KVCacheManager, PrefixHit
from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import FinishReason
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, lease_of
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.transfer import (
    CancelPull,
    GrantLease,
    PullFinished,
    StartPull,
)

LeaseSource = tuple[EngineId, LeaseId]
"""Names the engine and the lease there at another engine."""


class BlockLeases:
    """Holds the blocks of finished requests that decode engines may pull.

    ``local``: engine_id, host, port and tp_size of this engine.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        settings: KVTransferSettings,
        local: tuple[EngineId, str, int, int],
    ) -> None:
        self._kv = kv
        self._lease_s = settings.lease_s
        self._local = local
        self._block_ids: dict[LeaseId, list[list[int]]] = {}

    def __len__(self) -> int:
        return len(self._block_ids)

    def __contains__(self, lease_id: LeaseId) -> bool:
        return lease_id in self._block_ids

    def grant(self, request: Request, reason: FinishReason) -> tuple[GrantLease, RemoteKV] | None:
        """Keep the prompt's blocks of a request that ends now, if another engine may decode on.

        A stopped choice gets a lease too if there are others, which may go on; the server ends a
        lease that nobody needs. The request's other blocks are freed.
        """
        num_readers = request.message.num_readers
        # It ends with its first token, so that no later step can still write to the blocks that are
        # leased.
        assert not (request.message.do_remote_decode and request.num_in_flight)
        if (
            not request.message.do_remote_decode
            or num_readers < 1
            or (reason == "stop" and num_readers == 1)
        ):
            return None
        lease_id = lease_of(request.request_id)
        leased = self._kv.lease(request.tables, request.num_prompt_tokens)
        self._block_ids[lease_id] = leased.block_ids
        grant = GrantLease(
            lease_id=lease_id,
            block_ids=leased.block_ids,
            first_block_index=leased.first,
            block_hashes=request.prompt_hashes(),
            num_tokens=request.num_prompt_tokens,
            num_readers=num_readers,
            lease_s=self._lease_s,
        )
        engine_id, host, port, tp_size = self._local
        remote = RemoteKV(
            engine_id=engine_id,
            lease_id=lease_id,
            host=host,
            port=port,
            block_ids=leased.block_ids,
            num_tokens=request.num_prompt_tokens,
            tp_size=tp_size,
            lease_s=self._lease_s,
        )
        return grant, remote

    def ended(self, lease_id: LeaseId) -> None:
        """Free the blocks. Unknown ids are ignored."""
        # Full ones stay in the prefix cache until they are needed; reversed, so that the tail of a
        # prompt is reused before its head: without the head nobody finds the tail.
        for block_ids in self._block_ids.pop(lease_id, []):
            self._kv.pool.release(reversed(block_ids))

    def all_ids(self) -> Iterator[int]:
        """Yield each block once for each lease on it."""
        for groups in self._block_ids.values():
            for block_ids in groups:
                yield from block_ids


@dataclass(slots=True)
class BlockPull:
    """Says which blocks a pull owns, and for whom."""

    request: Request | None
    """The request that waits for it; None: cancelled, or the pull only ends a reader's lease."""
    source: LeaseSource
    hit: PrefixHit
    """Cached blocks that ``request`` shares meanwhile."""
    block_ids: list[list[int]]
    """Blocks to pull into, by group; they follow those of ``hit``."""


class BlockPulls:
    """Holds the pulls in flight and the blocks that they own."""

    def __init__(self, kv: KVCacheManager, settings: KVTransferSettings) -> None:
        self._kv = kv
        self._settings = settings
        self._in_flight: dict[PullId, BlockPull] = {}
        self._quarantined: dict[PullId, list[list[int]]] = {}
        self._num_started = 0

    def is_waited_for(self, request: Request) -> bool:
        """Return whether another choice of the same prompt waits for a pull from the same lease."""
        source = source_of(request)
        return any(
            pull.source == source and pull.request is not None for pull in self._in_flight.values()
        )

    def start(self, request: Request, hit: PrefixHit) -> StartPull | None:
        """Share ``hit`` and pull the prompt's other blocks.

        None, and nothing has changed, when no block is lacking.
        """
        num_logical = self._kv.num_logical_blocks(request.num_prompt_tokens)
        counts = [num_logical - hit.end(group) for group in range(len(hit.first))]
        if not any(counts):
            return None
        self._kv.share_hit(hit)
        block_ids = [self._kv.pool.allocate_for_pull(count) for count in counts]
        command = self._begin(
            BlockPull(request, source_of(request), hit, block_ids),
            request,
            [hit.end(group) for group in range(len(counts))],
        )
        request.pull_id = command.pull_id
        return command

    def tell_prefill_side(self, request: Request) -> StartPull:
        """Pull nothing: the prefill side hears that this reader needs the lease no more."""
        num_groups = self._kv.num_groups
        nothing = BlockPull(None, source_of(request), PrefixHit([], []), [[]] * num_groups)
        # No group wants a block: each begins where the prompt ends.
        end = self._kv.num_logical_blocks(request.num_prompt_tokens)
        return self._begin(nothing, request, [end] * num_groups)

    def cancel(self, request: Request) -> CancelPull:
        """Free the shared blocks of a waiting request that has ended; the pull keeps its own until
        it ends.
        """
        assert request.pull_id is not None
        pull = self._in_flight[request.pull_id]
        pull.request = None
        self._kv.release_hit(pull.hit)
        return CancelPull(pull_id=request.pull_id)

    def finish(self, event: PullFinished) -> BlockPull | None:
        """Move the pull's blocks to where they belong now. None when the id is unknown."""
        pull = self._in_flight.pop(event.pull_id, None)
        if pull is None:
            return None
        if event.ok and pull.request is not None:
            self._kv.adopt_pulled(pull.request.tables, pull.hit, pull.block_ids)
        elif event.in_flight:
            for block_ids in pull.block_ids:
                self._kv.pool.quarantine(block_ids)
            self._quarantined[event.pull_id] = pull.block_ids
        else:
            for block_ids in pull.block_ids:
                self._kv.pool.drop_pull(block_ids)
        if pull.request is not None:
            pull.request.pull_id = None
            if not event.ok:
                self._kv.release_hit(pull.hit)
        return pull

    def drained(self, pull_id: PullId) -> None:
        """Free the blocks of an abandoned pull, to which nothing can write any more."""
        for block_ids in self._quarantined.pop(pull_id, []):
            self._kv.pool.drain(block_ids)

    def shared_ids(self) -> Iterator[int]:
        """Yield the blocks that waiting requests share."""
        for pull in self._in_flight.values():
            if pull.request is not None:
                for block_ids in pull.hit.block_ids:
                    yield from block_ids

    def pulling_ids(self) -> Iterator[int]:
        for pull in self._in_flight.values():
            for block_ids in pull.block_ids:
                yield from block_ids

    def quarantined_ids(self) -> Iterator[int]:
        for groups in self._quarantined.values():
            for block_ids in groups:
                yield from block_ids

    def _begin(self, pull: BlockPull, request: Request, first_block_index: list[int]) -> StartPull:
        pull_id = PullId(f"pull-{self._num_started}")
        self._num_started += 1
        self._in_flight[pull_id] = pull
        remote = request.message.remote_kv
        assert remote is not None
        return StartPull(
            pull_id=pull_id,
            request_id=request.request_id,
            remote=remote,
            block_ids=pull.block_ids,
            first_block_index=first_block_index,
            block_hashes=request.prompt_hashes(),
            num_tokens=request.num_prompt_tokens,
            timeout_s=self._settings.pull_timeout_s,
            num_attempts=self._settings.pull_attempts,
            records_spans=request.message.records_spans,
        )


def source_of(request: Request) -> LeaseSource:
    """Return the lease that the request pulls from; choices of one prompt have the same."""
    remote = request.message.remote_kv
    assert remote is not None
    return remote.engine_id, remote.lease_id
