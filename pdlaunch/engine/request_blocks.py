"""Tells how many KV blocks of a request fit, which are cached, and which are worth loading."""

from __future__ import annotations

from collections.abc import Iterable

from pdlaunch.engine.kvcache.manager import KVCacheManager, PrefixHit
from pdlaunch.engine.request import Request


class RequestBlocks:
    """Answers the scheduler's questions about the blocks of one request.

    ``caches``: prefix caching is on.
    """

    def __init__(self, kv: KVCacheManager, block_size: int, *, caches: bool) -> None:
        self._kv = kv
        self._block_size = block_size
        self._caches = caches

    def room(self, request: Request) -> int:
        """Return how many tokens, after the scheduled ones, fit into the request's and all free
        blocks.
        """
        return self._kv.max_tokens(request.tables) - request.num_scheduled

    def have_room_for_one_more(self, requests: Iterable[Request]) -> bool:
        """Return whether each request can have its next token without taking blocks from others."""
        num_full = sum(
            request.num_scheduled >= request.tables.end * self._block_size for request in requests
        )
        return num_full * self._kv.num_groups <= self._kv.pool.num_free_blocks

    def has_room_for(self, request: Request, hit: PrefixHit, num_running: int) -> bool:
        """Return whether all known tokens of a new request fit.

        One more block for each running request has to fit too, or the new one would be preempted at
        once.
        """
        return self._kv.has_room_for(hit, len(request.token_ids), num_reserved=num_running)

    def find_prefix(self, request: Request) -> PrefixHit:
        """Return the cached blocks from which the request can compute on."""
        if self._caches:
            request.block_hasher.extend(request.token_ids)
        return self._kv.find_prefix(request.block_hasher.block_hashes, self._max_shared(request))

    def find_for_pull(self, request: Request) -> PrefixHit:
        """Return the cached blocks of the prompt, which a pull need not bring."""
        return self._kv.find_for_pull(
            request.prompt_hashes(), self._max_pull_hit(request), request.num_pulled_tokens
        )

    def gains_from_sibling(self, request: Request) -> bool:
        """Return whether the request could share blocks that another pull of the same prompt
        brings.
        """
        return self._max_pull_hit(request) > 0

    def is_computed_elsewhere(
        self, request: Request, hit: PrefixHit, running: Iterable[Request]
    ) -> bool:
        """Return whether a running request will soon compute blocks for which this one should wait.

        It should if they are at least half of the blocks that it could share and does not find.
        """
        max_blocks = self._max_shared(request)
        middle = (hit.end(0) + max_blocks) // 2
        if middle >= max_blocks:
            return False
        block_hash = request.block_hasher.block_hashes[middle]
        return any(
            other.num_remaining > 1
            and other.num_registered_blocks <= middle < len(other.block_hasher.block_hashes)
            and other.block_hasher.block_hashes[middle] == block_hash
            for other in running
        )

    def max_loadable(self, request: Request) -> int:
        """Return how many logical blocks are worth loading from host memory.

        What a pull brings lies behind them.
        """
        return self._max_pull_hit(request) if request.wants_pull else self._max_shared(request)

    def _max_pull_hit(self, request: Request) -> int:
        """Return the number of full blocks that a pull need not bring."""
        return request.num_pulled_tokens // self._block_size if self._caches else 0

    def _max_shared(self, request: Request) -> int:
        """Return how many full blocks may be shared: the last known token is always computed."""
        return (len(request.token_ids) - 1) // self._block_size if self._caches else 0
