"""Drains engines of a running deployment: they are given no new work, and nothing is moved."""

from __future__ import annotations

import asyncio
import contextlib
import math

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import AppRoute
from pdlaunch.http.errors import error_body
from pdlaunch.http.openapi import Operation
from pdlaunch.router.engine import Engine
from pdlaunch.router.outcomes import Outcome, engines_named, refusal, together
from pdlaunch.router.state import RouterState
from pdlaunch.router.supervisor_link import SupervisorLink

LISTED_TIMEOUT_S = 10.0
"""The registry may take this long to say what the supervisor has answered."""


class DrainCommands:
    """Answers ``drain`` and ``undrain`` of one router."""

    def __init__(self, state: RouterState, supervisor: SupervisorLink) -> None:
        self._state = state
        self._supervisor = supervisor

    def routes(self) -> list[AppRoute]:
        return [
            AppRoute("POST", path, handler, None, Operation(f"{summary} Takes the admin key."))
            for path, handler, summary in (
                ("/pdlaunch/drain", self._drain, "Give engines no new work."),
                ("/pdlaunch/undrain", self._undrain, "Give drained engines work again."),
            )
        ]

    async def _drain(self, http: web.Request) -> web.Response:
        """Answer when nothing runs at the engines, at the latest after ``timeout_s``."""
        names = engines_named(http.query.getall("engine", []))
        until_at = self._state.now() + read_seconds(http.query.get("timeout_s", "0"), "timeout_s")
        # All of them before the first is waited for.
        outcomes = [await self._set(name, is_drained=True) for name in names]
        return together([await self._waited(outcome, until_at) for outcome in outcomes])

    async def _undrain(self, http: web.Request) -> web.Response:
        names = engines_named(http.query.getall("engine", []))
        return together([await self._set(name, is_drained=False) for name in names])

    async def _set(self, name: str, *, is_drained: bool) -> Outcome:
        answer = await self._supervisor.set_drained(name, is_drained=is_drained)
        if answer.error:
            error = refusal(answer.error, answer.code)
            return Outcome(answer.engine or name, error.status, error_body(error))
        await self._see(answer.engine, is_drained=is_drained)
        return Outcome(answer.engine, 200, {"is_drained": is_drained, "notes": answer.notes})

    async def _see(self, name: str, *, is_drained: bool) -> None:
        """Wait until the registry says so too: requests that follow must find it so.

        Raises OverloadedError.
        """
        until_at = self._state.now() + LISTED_TIMEOUT_S
        while (engine := self._find(name)) is not None and (engine.is_drained != is_drained):
            left_s = until_at - self._state.now()
            if left_s <= 0:
                raise OverloadedError(
                    f"the registry does not show it of {name} yet",
                    status=503,
                    code="not_listed_yet",
                )
            await self._state.registry_change(left_s)

    async def _waited(self, outcome: Outcome, until_at: float) -> Outcome:
        if outcome.status != 200:
            return outcome
        pool, name = self._state.pool, outcome.engine
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_at):
                await pool.until_idle(name)
        return outcome._replace(answer={**outcome.answer, "running": pool.num_outstanding(name)})

    def _find(self, name: str) -> Engine | None:
        return next((each for each in self._state.pool.engines if each.name == name), None)


def read_seconds(text: str, param: str) -> float:
    """Return a number of seconds. Raises RequestError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RequestError(
            f"{param}: {text[:100]!r} is no number of seconds", param=param, code="invalid_timeout"
        )
    return seconds
