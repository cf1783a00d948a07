"""Commands a running deployment: sleep, wake, restart, drain, scale, roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import error_message
from pdlaunch.launch.client.api import Api
from pdlaunch.protocol.control import PlannedEngine


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what became of a command at one engine."""

    engine: str
    error: str | None = None  # none: it is done
    is_sleeping: bool = False
    num_bytes: int = 0  # device memory that was given back or taken
    running: int = 0
    """After a drain: requests that still run, and prompts whose KV blocks are still to be read."""
    notes: Sequence[str] = ()


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what is changed, or would be."""

    replicas: dict[Role, int]  # engines of each role afterwards
    starts: list[PlannedEngine]
    stops: dict[str, int]  # engines that stop, with the pieces of work that they had
    stops_first: bool
    drain_s: float


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what became of a change."""

    change: Change | None = None  # none: it was refused before it was planned
    notes: Sequence[str] = ()
    error: str = ""  # empty: it is done, or could be


def sleep_engines(
    admin: Api, *, level: int, mode: str, names: Sequence[str] = ()
) -> list[EngineOutcome]:
    """Put engines to sleep, one after the other; without ``names`` all of them."""
    return _command(admin, "/sleep", [("level", str(level)), ("mode", mode)], names)


def wake_engines(
    admin: Api, *, tags: Sequence[str] = (), names: Sequence[str] = ()
) -> list[EngineOutcome]:
    """Wake engines, or only their memory with these ``tags``; return when the router uses them."""
    return _command(admin, "/wake_up", [("tags", tag) for tag in tags], names)


def drain_engines(admin: Api, names: Sequence[str], *, timeout_s: float) -> list[EngineOutcome]:
    """Give engines no new work; return when nothing runs there, or after ``timeout_s``."""
    return _command(admin, "/pdlaunch/drain", [("timeout_s", f"{timeout_s:g}")], names)


def undrain_engines(admin: Api, names: Sequence[str]) -> list[EngineOutcome]:
    """Give drained engines work again."""
    return _command(admin, "/pdlaunch/undrain", [], names)


def restart_engine(admin: Api, name: str) -> EngineOutcome:
    """Start an engine, by its name or that of a process, anew; return when it serves again."""
    status, answer = admin.post(f"/pdlaunch/restart?{urlencode({'engine': name})}", {})
    if status == 200:
        return EngineOutcome(engine=answer["engines"][0]["engine"])
    return EngineOutcome(engine=name, error=error_message(answer) or f"HTTP {status}")


def _command(
    admin: Api, path: str, query: Sequence[tuple[str, str]], names: Sequence[str]
) -> list[EngineOutcome]:
    """Send a command. Raises PdlaunchError when all of it is refused."""
    pairs = [*query, *(("engine", name) for name in names)]
    status, answer = admin.post(f"{path}?{urlencode(pairs)}" if pairs else path, {})
    if "engines" not in answer:
        raise _refused(path.removeprefix("/pdlaunch/"), status, answer)
    outcomes = []
    for each in answer["engines"]:
        error = (error_message(each) or "it does not say why") if "error" in each else None
        outcomes.append(msgspec.convert(each | {"error": error}, EngineOutcome))
    return outcomes


def scale_engines(
    admin: Api,
    replicas: Mapping[Role, int],
    *,
    dry_run: bool = False,
    drain_timeout_s: float | None = None,
) -> ChangeOutcome:
    """Have this number of engines of each role; return when they serve. Raises PdlaunchError."""
    return _change(admin, "scale", dict(replicas.items()), dry_run, drain_timeout_s)


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
        raise _refused(command, status, answer)
    error = "" if status == 200 else error_message(answer) or f"HTTP {status}"
    return msgspec.convert(
        {"change": answer.get("change"), "notes": answer["notes"], "error": error}, ChangeOutcome
    )


def _refused(command: str, status: int, answer: dict[str, object]) -> PdlaunchError:
    return PdlaunchError(f"{command} was refused: {error_message(answer) or f'HTTP {status}'}")
