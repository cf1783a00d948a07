"""Changes the engines of a running launch: how many there are, their roles, and which get work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.commands import error_message
from pdlaunch.protocol.changes import PlannedEngine


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what is changed, or would be."""

    replicas: dict[Role, int]
    """Engines of each role afterwards."""
    starts: list[PlannedEngine]
    stops: dict[str, int]
    """Engines that stop, with the pieces of work that they had."""
    stops_first: bool
    drain_s: float


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what became of a change."""

    change: Change | None = None
    """None: it was refused before it was planned."""
    notes: Sequence[str] = ()
    error: str = ""
    """Empty: it is done, or could be."""


class DrainOutcome(msgspec.Struct, frozen=True):
    """Tells what became of one engine."""

    engine: str
    running: int = 0
    """Requests that still ran there, and prompts whose KV blocks were still to be read."""
    notes: Sequence[str] = ()
    error: str | None = None
    """None: it is drained, or is given work again."""


def scale_engines(
    admin: Api,
    replicas: Mapping[Role, int],
    *,
    dry_run: bool = False,
    drain_timeout_s: float | None = None,
) -> ChangeOutcome:
    """Have so many engines of each role; return when there are. Raises PdlaunchError."""
    wanted: dict[str, object] = dict(replicas.items())
    return _change(admin, "scale", wanted, dry_run, drain_timeout_s)


def turn_engine(
    admin: Api,
    name: str,
    role: Role,
    *,
    dry_run: bool = False,
    drain_timeout_s: float | None = None,
) -> ChangeOutcome:
    """Give an engine another role; return when its successor serves. Raises PdlaunchError."""
    return _change(admin, "role", {"engine": name, "role": role}, dry_run, drain_timeout_s)


def _change(
    admin: Api,
    command: str,
    wanted: Mapping[str, object],
    dry_run: bool,
    drain_timeout_s: float | None,
) -> ChangeOutcome:
    body = {**wanted, "dry_run": dry_run, "drain_timeout_s": drain_timeout_s}
    status, answer = admin.post(f"/pdlaunch/{command}", body)
    if status != 200 and "notes" not in answer:
        raise PdlaunchError(f"{command} was refused: {error_message(answer) or f'HTTP {status}'}")
    error = "" if status == 200 else error_message(answer) or f"HTTP {status}"
    return msgspec.convert(
        {"change": answer.get("change"), "notes": answer["notes"], "error": error}, ChangeOutcome
    )


def drain_engines(admin: Api, names: Sequence[str], *, timeout_s: float) -> list[DrainOutcome]:
    """Give engines no new work; return when nothing runs there, at the latest after ``timeout_s``.

    Raises PdlaunchError when the command is refused.
    """
    return _drain(admin, "drain", [("timeout_s", f"{timeout_s:g}")], names)


def undrain_engines(admin: Api, names: Sequence[str]) -> list[DrainOutcome]:
    """Give drained engines work again. Raises PdlaunchError when the command is refused."""
    return _drain(admin, "undrain", [], names)


def _drain(
    admin: Api, verb: str, query: list[tuple[str, str]], names: Sequence[str]
) -> list[DrainOutcome]:
    pairs = [*query, *(("engine", name) for name in names)]
    status, answer = admin.post(f"/pdlaunch/{verb}?{urlencode(pairs)}", {})
    if "engines" not in answer:
        raise PdlaunchError(f"{verb} was refused: {error_message(answer) or f'HTTP {status}'}")
    return [
        DrainOutcome(
            each["engine"],
            each.get("running", 0),
            each.get("notes", ()),
            (error_message(each) or "it does not say why") if "error" in each else None,
        )
        for each in answer["engines"]
    ]
