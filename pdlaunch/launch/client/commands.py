"""Commands a running deployment: sleep, wake, restart, drain, scale, roles."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import error_message
from pdlaunch.launch.client.api import Api
from pdlaunch.protocol.control import PlannedEngine


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command at one engine."""

    engine: str
    error: str | None = None  # none: it is done
    is_sleeping: bool = False
    num_bytes: int = 0  # device memory that was given back or taken
    running: int = 0
    """After a drain: requests that still run, and prompts whose KV blocks are still to be read."""
    notes: Sequence[str] = ()


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What is changed, or would be."""

    replicas: dict[Role, int]  # engines of each role afterwards
    starts: list[PlannedEngine]
    stops: dict[str, int]  # engines that stop, with the pieces of work that they had
    stops_first: bool
    drain_s: float


class ChangeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a change."""

    change: Change | None = None  # none: it was refused before it was planned
    notes: Sequence[str] = ()
    error: str = ""  # empty: it is done, or could be


def command_engines(
    admin: Api, path: str, names: Sequence[str] = (), **query: object
) -> list[EngineOutcome]:
    """Command engines by name, or all: ``/sleep``, ``/wake_up``, ``/pdlaunch/drain``,
    ``/pdlaunch/undrain``, ``/pdlaunch/restart``. Returns when it is done.

    Raises PdlaunchError when the whole command is refused.
    """
    text = urlencode({**query, "engine": list(names)}, doseq=True)
    status, answer = admin.post(f"{path}?{text}" if text else path, {})
    if "engines" not in answer:
        raise _refused(path, status, answer)
    outcomes = []
    for each in answer["engines"]:
        error = (error_message(each) or "it does not say why") if "error" in each else None
        outcomes.append(msgspec.convert(each | {"error": error}, EngineOutcome))
    return outcomes


def change_engines(
    admin: Api,
    path: str,
    *,
    dry_run: bool = False,
    drain_timeout_s: float | None = None,
    **wanted: object,
) -> ChangeOutcome:
    """Change the number of engines (``/pdlaunch/scale``) or the role of one (``/pdlaunch/role``).

    Returns when the engines serve. Raises PdlaunchError when the change is refused unplanned.
    """
    body = {**wanted, "dry_run": dry_run, "drain_timeout_s": drain_timeout_s}
    status, answer = admin.post(path, body)
    # With notes the change was planned, and the answer says what is left of it.
    if status != 200 and "notes" not in answer:
        raise _refused(path, status, answer)
    error = "" if status == 200 else error_message(answer) or f"HTTP {status}"
    found = {"change": answer.get("change"), "notes": answer["notes"], "error": error}
    return msgspec.convert(found, ChangeOutcome)


def _refused(path: str, status: int, answer: dict[str, object]) -> PdlaunchError:
    command = path.rpartition("/")[2]
    return PdlaunchError(f"{command} was refused: {error_message(answer) or f'HTTP {status}'}")
