"""Adds engines that run already to a router, and removes them, while requests run."""

from __future__ import annotations

import math

import msgspec
from aiohttp import web
from pydantic import ValidationError

from pdlaunch.config.external import DNS, RunningEngine
from pdlaunch.config.roles import EngineName, Role
from pdlaunch.errors import RequestError
from pdlaunch.http.app import AppRoute
from pdlaunch.http.errors import json_response
from pdlaunch.http.openapi import Operation
from pdlaunch.router.membership_watch import WatchedMembership
from pdlaunch.router.watched_engine import Member

SOURCE = "command"


class NewEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names an engine to add."""

    name: str
    role: Role
    url: str
    kind: EngineName | None = None
    """None: that of the others."""
    api_key: str | None = None
    """Sent to this engine alone; without it the engine is sent none."""


class EngineCommands:
    """Answers the commands that change which engines a router uses.

    ``membership`` is None in a launch, whose supervisor alone decides that.
    """

    def __init__(self, membership: WatchedMembership | None, drain_timeout_s: float) -> None:
        self._membership = membership
        self._drain_timeout_s = drain_timeout_s

    def routes(self) -> list[AppRoute]:
        return [
            AppRoute(
                "POST",
                "/pdlaunch/engines",
                self._add,
                None,
                Operation("Add an engine that runs already. Takes the admin key."),
            ),
            AppRoute(
                "DELETE",
                "/pdlaunch/engines/{engine}",
                self._remove,
                None,
                Operation("Drain and remove an engine. Takes the admin key."),
            ),
        ]

    async def _add(self, http: web.Request) -> web.Response:
        """Answer at once; /pdlaunch/status says when the engine is ready, or why it is not."""
        membership = self._open()
        try:
            new = msgspec.json.decode(await http.read(), type=NewEngine)
            engine = RunningEngine(name=new.name, role=new.role, url=new.url, kind=new.kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(str(error), code="invalid_engine") from None
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            field = str(first["loc"][0])
            message = first["msg"].removeprefix("Value error, ")
            raise RequestError(f"{field}: {message}", param=field, code="invalid_engine") from None
        if engine.url.startswith(DNS):
            raise RequestError(
                "a name in DNS is followed from the start: list it in engines",
                param="url",
                code="invalid_engine",
            )
        if new.api_key is not None and not _is_key(new.api_key):
            raise RequestError(
                "api_key: must be printable ASCII without spaces",
                param="api_key",
                code="invalid_engine",
            )
        kind = engine.kind or membership.kind
        membership.add(Member(new.name, engine.role, engine.url, kind, new.api_key), SOURCE)
        return json_response({"engine": new.name, "url": engine.url, "state": "starting"})

    async def _remove(self, http: web.Request) -> web.Response:
        """Answer when the engine is drained, at the latest after ``drain_timeout_s``."""
        membership = self._open()
        name = http.match_info["engine"]
        text = http.query.get("drain_timeout_s", str(self._drain_timeout_s))
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not 0 <= timeout_s < math.inf:
            raise RequestError(
                f"drain_timeout_s: {text[:100]!r} is no number of seconds",
                param="drain_timeout_s",
                code="invalid_timeout",
            )
        num_works = await membership.remove(name, timeout_s)
        return json_response({"engine": name, "drained": num_works == 0})

    def _open(self) -> WatchedMembership:
        if self._membership is None:
            raise RequestError(
                "the engines of a launch are its own: `pdlaunch scale` adds and removes them; "
                "`pdlaunch router` takes engines that run already",
                status=409,
                code="own_engines",
            )
        return self._membership


def _is_key(text: str) -> bool:
    return bool(text) and all("!" <= character <= "~" for character in text)
