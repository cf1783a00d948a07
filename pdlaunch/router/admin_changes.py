"""Changes the engines of a running launch: how many there are of each role, and their roles."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from aiohttp import web

from pdlaunch.config.roles import Role
from pdlaunch.errors import RequestError
from pdlaunch.http.app import AppRoute
from pdlaunch.http.errors import error_body, json_response
from pdlaunch.http.openapi import Operation
from pdlaunch.protocol.changes import ChangeEngines
from pdlaunch.router.outcomes import refusal
from pdlaunch.router.state import RouterState
from pdlaunch.router.supervisor_link import SupervisorLink

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=1024)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class ScaleBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Says how many engines of each role there are to be; null: as many as there are."""

    prefill: Count | None = None
    decode: Count | None = None
    both: Count | None = None
    dry_run: bool = False
    drain_timeout_s: Seconds | None = None
    """Time for what runs at an engine that stops; null: ``drain_timeout_s`` of the launch."""


class RoleBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names an engine, and the role that it is to have."""

    engine: str
    role: Role
    dry_run: bool = False
    drain_timeout_s: Seconds | None = None


class ChangeCommands:
    """Answers ``scale`` and ``role`` of one router."""

    def __init__(self, state: RouterState, supervisor: SupervisorLink) -> None:
        self._state = state
        self._supervisor = supervisor

    def routes(self) -> list[AppRoute]:
        return [
            AppRoute("POST", path, handler, None, Operation(f"{summary} Takes the admin key."))
            for path, handler, summary in (
                ("/pdlaunch/scale", self._scale, "Add or remove engines of a launch."),
                ("/pdlaunch/role", self._role, "Give an engine of a launch another role."),
            )
        ]

    async def _scale(self, http: web.Request) -> web.Response:
        """Answer when the engines are as they are wanted, or at once with ``dry_run``."""
        body = _read(await http.read(), ScaleBody)
        numbers: dict[Role, int | None] = {
            "prefill": body.prefill,
            "decode": body.decode,
            "both": body.both,
        }
        replicas = {role: number for role, number in numbers.items() if number is not None}
        if not replicas:
            raise RequestError(
                "say how many engines there are to be: prefill, decode or both",
                code="invalid_change",
            )
        return await self._change(
            ChangeEngines(
                question=0,
                replicas=replicas,
                dry_run=body.dry_run,
                drain_s=body.drain_timeout_s,
            )
        )

    async def _role(self, http: web.Request) -> web.Response:
        body = _read(await http.read(), RoleBody)
        return await self._change(
            ChangeEngines(
                question=0,
                turn=body.engine,
                role=body.role,
                dry_run=body.dry_run,
                drain_s=body.drain_timeout_s,
            )
        )

    async def _change(self, wanted: ChangeEngines) -> web.Response:
        """Have it done. The answer says what runs at the engines that stop, as of the start."""
        running = {engine.name: engine.num_outstanding for engine in self._state.pool.engines}
        answer = await self._supervisor.change(wanted)
        body: dict[str, object] = {"dry_run": wanted.dry_run, "notes": answer.notes}
        if answer.change is not None:
            stops = {name: running.get(name, 0) for name in answer.change.stops}
            body["change"] = msgspec.to_builtins(answer.change) | {"stops": stops}
        if not answer.error:
            return json_response(body)
        error = refusal(answer.error, answer.code)
        return json_response(body | error_body(error), status=error.status)


def _read(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(str(error), code="invalid_change") from None
