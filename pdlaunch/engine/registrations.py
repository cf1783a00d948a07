"""Lets other requests find full blocks, in the prefix cache and in host memory."""

from __future__ import annotations

from pdlaunch.engine.host_loads import HostLoads
from pdlaunch.engine.kvcache.manager import KVCacheManager
from pdlaunch.engine.request import Request


class Registrations:
    """Registers blocks once they are full and computed.

    ``caches``: prefix caching is on. Without it nothing is registered, and the host tier, which
    needs it, is off too.
    """

    def __init__(
        self, kv: KVCacheManager, host: HostLoads, block_size: int, *, caches: bool
    ) -> None:
        self._kv = kv
        self._host = host
        self._block_size = block_size
        self._caches = caches
        self._pending: list[Request] = []
        """Requests whose first blocks neither the prefix cache nor the host tier knows of yet."""

    def __contains__(self, request: Request) -> bool:
        """Return whether blocks of the request are pending."""
        return request in self._pending

    def add_pending(self, request: Request) -> None:
        """Note that the request got blocks without computing them: ``register_pending`` will
        register them.
        """
        self._pending.append(request)

    def register_pending(self) -> None:
        """Let other requests find the blocks that new ones did not have to compute.

        No step needs this, so the loop calls it while one runs. It must also come before anything
        that looks for cached blocks or takes blocks back.
        """
        pending, self._pending = self._pending, []
        for request in pending:
            self.register(request)

    def register(self, request: Request) -> None:
        """Let others find the blocks that the request has filled since the last call."""
        # Most tokens fill no block, and this is asked for each request of each step.
        start, stop = request.num_registered_blocks, request.num_computed // self._block_size
        if not self._caches or start >= stop:
            return
        hasher = request.block_hasher
        hasher.extend(request.token_ids)
        self._kv.register(request.tables, hasher.block_hashes, start, stop)
        request.num_registered_blocks = stop
        # When they are full, not when they are evicted: then somebody else needs the block at once,
        # and would wait for the copy.
        self._host.store(request, range(start, stop))
