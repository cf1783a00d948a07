"""What every request of the router shares: the pool, the client side, the counters, and news of the
registry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec

from pdlaunch.protocol.control import Registry
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import Engine, EnginePool
from pdlaunch.router.suspects import SuspectBook

CLOSE_TIMEOUT_S = 2.0
DEATH_NEWS_S = 1.0
"""For the supervisor to tell of a death that it has told an engine's server of."""


class RecoverySettings(msgspec.Struct, frozen=True, kw_only=True):
    """How hard the router tries to save a request that an engine has dropped."""

    max_attempts: int = 4
    """Engines asked for one hop: a request that kills engines must not kill them all."""
    wait_s: float = 60.0
    """For an engine to come, or to come back, after a failure."""
    retry_wait_s: float = 1.0
    """Before an engine that failed and that the registry still calls ready is asked again, where
    there is no other.
    """
    busy_wait_s: float = 1.0
    """Before a busy engine is asked again."""


class Hops:
    """Shared by all requests of the process; lives in its event loop."""

    def __init__(
        self,
        pool: EnginePool,
        client: EngineClient,
        metrics: RouterMetrics,
        recovery: RecoverySettings,
    ) -> None:
        self.pool = pool
        self.client = client
        self.metrics = metrics
        self.recovery = recovery
        self.suspects = SuspectBook()
        self._changed = asyncio.Event()
        self._has_registry = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def update(self, registry: Registry) -> None:
        """Take over a registry and wake those who wait for an engine."""
        self.pool.update(registry)
        self.metrics.show_pairs(registry.pairs)
        self._has_registry.set()
        self._changed.set()
        self._changed = asyncio.Event()
        for engine in self.pool.engines:
            if engine.ready and engine.max_model_len is None:
                self.spawn(self._learn_max_model_len(engine))

    async def news_of_death(self, engine: Engine) -> None:
        """Return when the registry knows of the death that an engine's server has spoken of:
        usually it does already.
        """
        deadline_s = self.now_s() + DEATH_NEWS_S
        while self.pool.lists(engine) and (left_s := deadline_s - self.now_s()) > 0:
            await self.registry_change(left_s)

    async def registry_change(self, timeout_s: float) -> None:
        """Return at the next change of the registry, at the latest after ``timeout_s``."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    async def knows_engines(self) -> None:
        """Return once there has been a registry."""
        await self._has_registry.wait()

    def now_s(self) -> float:
        """The event loop's clock."""
        return asyncio.get_running_loop().time()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beyond the life of the request that wants it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until what was spawned is done."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def close(self) -> None:
        """Finish what was spawned, then close the client side."""
        await self.settled()
        await self.client.close()

    async def _learn_max_model_len(self, engine: Engine) -> None:
        engine.max_model_len = await self.client.read_max_model_len(engine)
