"""Accounts for a prompt until its first token: at its engine, in its queue, and by its estimate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from pdlaunch.protocol.ids import HopId
from pdlaunch.router.cost_model import Estimate
from pdlaunch.router.engine import Engine
from pdlaunch.router.pace import OVERHEAD_S
from pdlaunch.router.policy import Route, RoutingRequest
from pdlaunch.router.state import RouterState
from pdlaunch.router.takeover import WaitingPrompt


class Forecast(NamedTuple):
    """Holds what a route promises of the first token."""

    engine: Engine
    estimate: Estimate
    sent_at: float


class FirstTokenWatch:
    """Knows which engine computes a prompt of which no token has come, and by when it should."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._forecast: Forecast | None = None
        """The route's estimate, until a token has come or an engine has failed."""
        self._unanswered = contextlib.ExitStack()
        self._unanswered_at: Engine | None = None
        """The engine that computes the prompt, until a token has come."""
        self._waiting: WaitingPrompt | None = None

    def promise(self, route: Route) -> None:
        """Take the estimate of a route that is taken now."""
        first = route.prefill or route.decode
        if route.estimate is not None and first is not None:
            self._forecast = Forecast(first, route.estimate, self._state.now())

    @contextlib.contextmanager
    def waits(self, engine: Engine, hop_id: HopId, request: RoutingRequest) -> Iterator[None]:
        """Let other engines take the prompt over from ``engine`` for as long as the block runs."""
        self._waiting = WaitingPrompt(request=request, prefill=engine, hop_id=hop_id)
        with self._state.waiting.waits(self._waiting):
            yield

    def take_over(self) -> Route | None:
        """Return, once, the route for which the prompt was asked back; None: it was not."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else waiting.route

    def computes(self, engine: Engine, request: RoutingRequest) -> None:
        """Count the prompt as work of the engine until its first token comes."""
        num_tokens = self._state.pool.num_new_tokens(engine, request)
        self._unanswered_at = engine
        self._unanswered.enter_context(engine.computing(num_tokens, self._state.pool.clock))

    def expects(self, engine: Engine, request: RoutingRequest, *, is_counted: bool = True) -> None:
        """Count its streams at ``engine``, where they begin with the first token, as not begun.

        ``is_counted``: they are among the engine's streams already.
        """
        num_tokens, num_streams = request.num_prompt_tokens, request.num_choices
        if not is_counted:
            self._unanswered.enter_context(
                engine.working(num_prompt_tokens=num_tokens, num_streams=num_streams)
            )
        self._unanswered.enter_context(engine.expecting(num_streams, num_tokens))

    def computes_no_more(self) -> None:
        """Count the prompt as nobody's work."""
        self._unanswered.close()

    def came(self, engine: Engine, *, as_meant: bool) -> None:
        """Note that a token is here. ``as_meant``: no engine has failed the prompt before."""
        if self._waiting is not None:
            self._state.waiting.begun(self._waiting)
        if self._unanswered_at is not None:
            self._unanswered_at = None
            self._unanswered.close()
            self._state.waiting.consider()
        forecast, self._forecast = self._forecast, None
        if forecast is not None and forecast.engine is engine and as_meant:
            self._learn(forecast)

    def _learn(self, forecast: Forecast) -> None:
        """Compare the estimate with the time that the first token took."""
        took_s = self._state.now() - forecast.sent_at
        if took_s > 0:
            error = abs(forecast.estimate.first_token_s - took_s) / took_s
            self._state.metrics.estimated(forecast.estimate.kind, error)
            computed_s = forecast.estimate.computed_s
            forecast.engine.experience.observe((1.0, computed_s), took_s)
            forecast.engine.pace.took("first_token", took_s + OVERHEAD_S, computed_s + OVERHEAD_S)
