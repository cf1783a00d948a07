"""Lets an engine that has become free take over a prompt that waits at a prefill engine.

::

    prefill   [computes one][next][ .. ][last]◀─ withdraw ─┐   only what has not begun:
    decode    [its streams ..      free]────── takes ──────┘   the rank that holds it decides

Routes are chosen when requests come, by estimates. Where these were wrong, or streams end, the last
prompt in the queue gains most by leaving it. The prefill engine ends its part with the error
``withdrawn``, or goes on as if nothing had been asked: nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec

from pdlaunch.protocol.ids import HopId
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.policy import Route, RoutingRequest
from pdlaunch.router.pool import EnginePool


class WaitingPrompt(msgspec.Struct, kw_only=True, eq=False):
    """Describes a prompt that a prefill engine has been given."""

    request: RoutingRequest
    prefill: Engine
    hop_id: HopId
    route: Route | None = None
    """The route that it takes if the prefill engine gives it back; None: that was not asked."""


class WaitingPrompts:
    """Holds the prompts that prefill engines have and of which no token has come."""

    def __init__(
        self,
        pool: EnginePool,
        client: EngineClient,
        metrics: RouterMetrics,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._pool = pool
        self._client = client
        self._metrics = metrics
        self._spawn = spawn
        self._prompts: dict[WaitingPrompt, None] = {}
        """In the order in which they were sent."""

    @contextlib.contextmanager
    def waits(self, prompt: WaitingPrompt) -> Iterator[None]:
        """Let others take the prompt over for as long as the block runs."""
        self._prompts[prompt] = None
        try:
            yield
        finally:
            self.begun(prompt)

    def begun(self, prompt: WaitingPrompt) -> None:
        """Note that the prefill engine has computed the prompt, or will not."""
        self._prompts.pop(prompt, None)

    def consider(self) -> None:
        """Have the last prompt of each queue taken over by an engine that would do it sooner.

        One at a time for each engine that takes: the next one is considered when that has come.
        """
        if not self._prompts:
            return
        taking = {one.route.decode for one in self._prompts if one.route is not None}
        last = {one.prefill.name: one for one in self._prompts if one.route is None}
        for prompt in last.values():
            route = self._pool.take_over(prompt.request, prompt.prefill)
            if route is not None and route.decode not in taking:
                prompt.route = route
                taking.add(route.decode)
                self._metrics.asked_to_withdraw()
                self._spawn(self._client.withdraw(prompt.prefill, prompt.hop_id))
