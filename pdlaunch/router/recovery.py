"""Recovers a prompt that engines have failed: decides who is asked next, and when that ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pdlaunch.errors import OverloadedError
from pdlaunch.http.errors import RETRY_AFTER_S
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_errors import EngineFailure, EngineRefusal
from pdlaunch.router.policy import Hop, Route, RoutingRequest
from pdlaunch.router.state import RouterState

logger = logging.getLogger(__name__)


class Attempts:
    """Remembers what was tried for one prompt and failed, and decides who is asked next."""

    def __init__(self, state: RouterState) -> None:
        self.tried: set[EngineKey] = set()
        self._state = state
        self._failure: EngineFailure | EngineRefusal | None = None
        self._retry_at = 0.0
        """The instant from which engines that were tried may be asked again."""
        self._trouble_since_at: float | None = None
        """The instant at which the first engine failed since something was heard."""
        self._num_decode_failures = 0
        self._turned_away_by: set[EngineKey] = set()
        self._tries: set[EngineKey] = set()
        """Engines that were asked to see whether they work again: failing costs no attempt."""

    @property
    def num_tried(self) -> int:
        """Count the engines that have failed, without those that were only given a try."""
        return len(self.tried - self._tries)

    def follow(self, route: Route) -> None:
        """Note which engines a route gives a try."""
        for engine in (route.prefill, route.decode, route.planned):
            if engine is not None and engine.name in route.tries:
                self._tries.add(engine.key)
                self._state.metrics.tried(engine.name)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def heard(self) -> None:
        """Note that an engine has said something: the time for waiting begins anew."""
        self._trouble_since_at = None

    def begin_decode(self) -> None:
        """Forget the failures of prefill, which has answered."""
        self.tried.clear()
        self.forget()
        self.heard()

    def forget(self) -> None:
        """Let go of the last failure, whose traceback leads back to here."""
        self._failure = None

    def is_final(
        self,
        engine: Engine,
        hop: Hop,
        failure: EngineFailure | EngineRefusal,
        *,
        pulls_from: Engine | None = None,
    ) -> bool:
        """Note what went wrong; True for a refusal that no other engine would take back.

        ``pulls_from``: the engine had said nothing but was to pull the prompt from there. If it
        lives to tell its failure, that is the pair's.
        """
        if isinstance(failure, EngineRefusal) and not failure.is_busy:
            return True
        if isinstance(failure, EngineFailure):
            logger.warning("%s hop failed: %s", hop, str(failure))
            if pulls_from is not None and failure.is_told:
                self._state.pool.pulled(pulls_from, engine, ok=False)
            else:
                self._state.pool.failed(engine)
            self._state.metrics.engine_failed(engine.name, hop)
            now_at = self._state.now()
            self._retry_at = now_at + self._state.recovery.retry_wait_s
            if self._trouble_since_at is None:
                self._trouble_since_at = now_at
        else:
            self.heard()
        self.tried.add(engine.key)
        self._failure = failure
        return False

    def exhausts_decode(self, engine: Engine, failure: EngineFailure | EngineRefusal) -> bool:
        """Count a failure of decode; True when there have been too many.

        An engine that turns the request away again has survived it, and is not counted.
        """
        if isinstance(failure, EngineFailure):
            is_known = engine.key in self._turned_away_by
            if failure.turned_away:
                self._turned_away_by.add(engine.key)
            is_free = engine.key in self._tries or (failure.turned_away and is_known)
            self._num_decode_failures += not is_free
        return self._num_decode_failures >= self._state.recovery.max_attempts

    async def next_engine(
        self,
        request: Callable[[], RoutingRequest],
        *,
        on_route: Callable[[Route], None],
        has_begun: bool,
        may_wait: bool,
    ) -> Engine:
        """Return the engine for the next attempt; after a failure it is waited for.

        ``request`` is asked before each try; ``on_route`` is told what the policy says.
        ``has_begun``: the client has tokens. ``may_wait``: somebody has worked for the request.
        Raises the last failure, or OverloadedError.
        """
        state = self._state
        # The time counts from the first failure, so that engines that fail in turn end it too.
        since_at = state.now() if self._trouble_since_at is None else self._trouble_since_at
        end_at = since_at + state.recovery.wait_s
        while True:
            route = state.pool.route(request())
            on_route(route)
            self.follow(route)
            if route.decode is not None:
                return route.decode
            left_s = end_at - state.now()
            # Nothing is lost yet: the client can ask another deployment, or again.
            if self._failure is None and not may_wait:
                raise no_engine_ready("no engine is ready")
            if isinstance(self._failure, EngineRefusal):
                # All are busy. A client without an answer is told so; a stream waits.
                if left_s <= 0 or not has_begun:
                    raise self._failure
                await state.registry_change(min(left_s, state.recovery.busy_wait_s))
                self.tried.clear()
            elif left_s <= 0 or (self._failure is not None and not self._failure.may_return):
                raise self._failure or no_engine_ready("no engine can go on with this request")
            else:
                await self._wait_for_return(left_s)

    async def _wait_for_return(self, left_s: float) -> None:
        """Wait for news of the registry, or until engines that failed may be asked again.

        The registry need not know that an engine was away.
        """
        state = self._state
        retry_in_s = max(0.0, self._retry_at - state.now()) if self.tried else left_s
        await state.registry_change(min(left_s, retry_in_s))
        if state.now() >= self._retry_at:
            self.tried.clear()


def no_engine_ready(message: str) -> OverloadedError:
    """Return the error for a request that no engine can be given now."""
    return OverloadedError(message, status=503, retry_after_s=RETRY_AFTER_S, code="no_engine_ready")
