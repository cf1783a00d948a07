"""Commands a launch and looks inside its engines; the clients' key opens none of these routes.

They answer at the admin socket of the launch without a key, and over TCP with ``admin_api_key``,
where one is set. The engines are asked with the launch's own token. ``engine=NAME``, repeated,
chooses engines; without it: all that were not given up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import hdrs, web

from pdlaunch.config.roles import Role
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import AppRoute, request_id_of
from pdlaunch.http.errors import error_body
from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.http.openapi import Operation
from pdlaunch.protocol.control import Restarting
from pdlaunch.router.admin_changes import ChangeCommands
from pdlaunch.router.admin_drains import DrainCommands
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure
from pdlaunch.router.outcomes import Outcome, engines_named, failed_outcome, refusal, together
from pdlaunch.router.state import RouterState
from pdlaunch.router.supervisor_link import SupervisorLink
from pdlaunch.router.vllm_sleep import fall_asleep, wake_up

AWAKE_TIMEOUT_S = 10.0
"""The registry may take this long to say what an engine has just said itself."""
RESTART_TIMEOUT_S = 850.0
"""An engine must serve again by then; `pdlaunch restart` waits a little longer."""
ENGINE_CHECK_TIMEOUT_S = 40.0
"""Longer than an engine waits for its rank."""

Query = Sequence[tuple[str, str]]


class Admin:
    """Answers the commands of one router."""

    def __init__(self, state: RouterState, supervisor: SupervisorLink) -> None:
        self._state = state
        self._supervisor = supervisor

    def routes(self) -> list[AppRoute]:
        """Return all of them; whoever adds a command adds a row."""
        return [
            *(
                AppRoute(method, path, handler, None, Operation(f"{summary} Takes the admin key."))
                for method, path, handler, summary in (
                    ("POST", "/sleep", self._sleep, "Put engines to sleep."),
                    ("POST", "/wake_up", self._wake_up, "Wake engines up."),
                    ("GET", "/is_sleeping", self._is_sleeping, "Say which engines sleep."),
                    ("POST", "/pdlaunch/restart", self._restart, "Restart engines."),
                    ("GET", "/pdlaunch/integrity", self._integrity, "Prove who owns each block."),
                    (
                        "*",
                        "/pdlaunch/engines/{engine}/{path:.*}",
                        self._one_engine,
                        "Pass a call on to one engine.",
                    ),
                )
            ),
            *DrainCommands(self._state, self._supervisor).routes(),
            *ChangeCommands(self._state, self._supervisor).routes(),
        ]

    async def _sleep(self, http: web.Request) -> web.Response:
        """Put engines to sleep, prefill engines first: decode engines fetch what those hold while
        awake.
        """
        return together(
            [
                await self._post(engine, http, partial(fall_asleep, query=http.query))
                for engine in self._chosen(http, first="prefill")
            ]
        )

    async def _wake_up(self, http: web.Request) -> web.Response:
        """Decode engines first: they shake hands with prefill engines as these come back."""
        tags = http.query.getall("tags", [])
        outcomes = [
            await self._post(engine, http, partial(wake_up, tags=tags))
            for engine in self._chosen(http, first="decode")
        ]
        await self._see_awake(
            {outcome.engine for outcome in outcomes if outcome.answer.get("is_sleeping") is False}
        )
        return together(outcomes)

    async def _is_sleeping(self, http: web.Request) -> web.Response:
        outcomes = [await self._ask(engine, "GET", "/is_sleeping") for engine in self._chosen(http)]
        return together(
            outcomes,
            is_sleeping=all(outcome.answer.get("is_sleeping", False) for outcome in outcomes),
        )

    async def _restart(self, http: web.Request) -> web.Response:
        """Start engines anew, one after the other, so that others serve meanwhile; answered when
        they serve again.

        Unlike the other commands it knows an engine by the names of its processes too, and means
        none without a name.
        """
        names = engines_named(http.query.getall("engine", []))
        return together([await self._restart_one(name) for name in names])

    async def _restart_one(self, name: str) -> Outcome:
        begun = await self._supervisor.restart(name)
        if begun.error:
            error = refusal(begun.error, "not_now" if begun.engine else "engine_not_found")
            return Outcome(name, error.status, error_body(error))
        until_at = self._state.now() + RESTART_TIMEOUT_S
        while (successor := self._successor(begun)) is None:
            left_s = until_at - self._state.now()
            if left_s <= 0:
                message = (
                    f"{begun.engine} does not serve {RESTART_TIMEOUT_S:g} s after it was "
                    "restarted; see its log"
                )
                return Outcome(
                    begun.engine,
                    503,
                    error_body(OverloadedError(message, status=503, code="not_ready")),
                )
            await self._state.registry_change(left_s)
        if successor.state == "failed":
            given_up = OverloadedError(
                f"{begun.engine} is given up again: {successor.reason}",
                status=503,
                code="engine_failed",
            )
            return Outcome(begun.engine, given_up.status, error_body(given_up))
        return Outcome(begun.engine, 200, {"incarnation": successor.processes[0]})

    def _successor(self, begun: Restarting) -> Engine | None:
        """Return the engine once it serves again, stands by drained, or is given up again."""
        engines = [
            e
            for e in self._state.pool.engines
            if e.name == begun.engine and e.processes[0] > begun.incarnation
        ]
        return next(
            (
                engine
                for engine in engines
                if engine.ready or engine.state in ("failed", "draining")
            ),
            None,
        )

    async def _integrity(self, http: web.Request) -> web.Response:
        """Tell who owns each KV block of each engine; an engine that cannot be asked is not ok."""
        outcomes = [
            await self._ask(engine, "GET", "/pdlaunch/integrity", timeout_s=ENGINE_CHECK_TIMEOUT_S)
            for engine in self._chosen(http)
        ]
        return together(outcomes, ok=all(outcome.answer.get("ok", False) for outcome in outcomes))

    async def _one_engine(self, http: web.Request) -> web.Response:
        """Pass any call on to one engine, and its answer back once it is whole."""
        (engine,) = self._named([http.match_info["engine"]])
        path = f"/{quote(http.match_info['path'])}"
        headers: dict[str, str] = {REQUEST_ID_HEADER: request_id_of(http)}
        if encoding := http.headers.get(hdrs.CONTENT_ENCODING):
            headers[hdrs.CONTENT_ENCODING] = encoding
        status, body, content_type = await self._state.client.call(
            engine, http.method, path, list(http.query.items()), await http.read(), headers=headers
        )
        return web.Response(status=status, body=body, headers={"Content-Type": content_type})

    async def _post(
        self,
        engine: Engine,
        http: web.Request,
        with_vllm: Callable[[RouterState, Engine], Awaitable[dict[str, Any]]],
    ) -> Outcome:
        """Send the command on; ``with_vllm`` does it for an engine of vLLM."""
        # Whatever else it is, it is asked as a native engine is.
        if engine.capabilities.kind == "vllm":
            try:
                return Outcome(engine.name, 200, await with_vllm(self._state, engine))
            except EngineFailure as error:
                return failed_outcome(engine.name, error)
            except (RequestError, OverloadedError) as error:
                return Outcome(engine.name, error.status, error_body(error))
        query = [(name, value) for name, value in http.query.items() if name != "engine"]
        return await self._ask(engine, "POST", http.path, query)

    async def _ask(
        self,
        engine: Engine,
        method: str,
        path: str,
        query: Query = (),
        *,
        timeout_s: float | None = None,
    ) -> Outcome:
        try:
            status, body, _ = await self._state.client.call(
                engine, method, path, query, timeout_s=timeout_s
            )
            answer = msgspec.json.decode(body, type=dict[str, Any])
        except (EngineFailure, ValueError, RecursionError) as error:
            return failed_outcome(engine.name, error)
        return Outcome(engine.name, status, answer)

    def _chosen(self, http: web.Request, first: Role = "prefill") -> list[Engine]:
        """Return the engines that the query names, those of role ``first`` at first.

        Raises RequestError.
        """
        names = http.query.getall("engine", [])
        engines = (
            self._named(names)
            if names
            else [e for e in self._state.pool.engines if e.state != "failed"]
        )
        return sorted(engines, key=lambda engine: (engine.role != first, engine.name))

    def _named(self, names: Iterable[str]) -> list[Engine]:
        known = {engine.name: engine for engine in self._state.pool.engines}
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none yet"
            raise RequestError(
                f"there is no engine {unknown[0][:100]}; there are: {there}",
                param="engine",
                status=404,
                code="engine_not_found",
            )
        return [known[name] for name in dict.fromkeys(names)]

    async def _see_awake(self, names: set[str]) -> None:
        """Wait until the registry says so too: requests that follow must find these engines.
        Raises OverloadedError.
        """
        until_at = self._state.now() + AWAKE_TIMEOUT_S
        while any(
            engine.name in names and engine.state == "sleeping"
            for engine in self._state.pool.engines
        ):
            left_s = until_at - self._state.now()
            if left_s <= 0:
                raise OverloadedError(
                    "the engines are awake, but not yet in the registry",
                    status=503,
                    code="not_listed_yet",
                )
            await self._state.registry_change(left_s)
