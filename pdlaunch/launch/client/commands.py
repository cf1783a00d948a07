"""Sends commands to a running deployment: put engines to sleep, wake them up, start them anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api


class SleepOutcome(msgspec.Struct, frozen=True):
    """Tells what one engine has answered."""

    engine: str
    is_sleeping: bool
    num_bytes: int = 0
    """Device memory given back or taken."""
    error: str | None = None


def sleep_engines(
    admin: Api, *, level: int, mode: str, names: Sequence[str] = ()
) -> list[SleepOutcome]:
    """Put engines to sleep, one after the other; without ``names`` all of them.

    Raises PdlaunchError when the command is refused.
    """
    return _command(admin, "/sleep", [("level", str(level)), ("mode", mode)], names)


def wake_engines(
    admin: Api, *, tags: Sequence[str] = (), names: Sequence[str] = ()
) -> list[SleepOutcome]:
    """Wake engines up; return when the router uses them again.

    ``tags``: which memory; none means all. Raises PdlaunchError when the command is refused.
    """
    return _command(admin, "/wake_up", [("tags", tag) for tag in tags], names)


class RestartOutcome(msgspec.Struct, frozen=True):
    """Tells what became of one engine."""

    engine: str
    error: str | None = None
    """None: it serves again."""


def restart_engine(admin: Api, name: str) -> RestartOutcome:
    """Start an engine anew; return when it serves again, or why it does not.

    ``name``: of the engine or one of its processes. Raises PdlaunchError.
    """
    status, answer = admin.post(f"/pdlaunch/restart?{urlencode({'engine': name})}", {})
    if status == 200:
        return RestartOutcome(answer["engines"][0]["engine"])
    return RestartOutcome(name, error_message(answer) or f"HTTP {status}")


def _command(
    admin: Api, path: str, query: list[tuple[str, str]], names: Sequence[str]
) -> list[SleepOutcome]:
    pairs = [*query, *(("engine", name) for name in names)]
    status, answer = admin.post(f"{path}?{urlencode(pairs)}" if pairs else path, {})
    if "engines" not in answer:
        raise PdlaunchError(f"{path} was refused: {error_message(answer) or f'HTTP {status}'}")
    return [_outcome(engine) for engine in answer["engines"]]


def _outcome(answer: dict[str, Any]) -> SleepOutcome:
    if "error" in answer:
        return SleepOutcome(
            answer["engine"], False, error=error_message(answer) or "it does not say why"
        )
    return SleepOutcome(answer["engine"], answer["is_sleeping"], answer["num_bytes"])


def error_message(answer: dict[str, Any]) -> str:
    """Return the words of an error in OpenAI's form; empty when there are none."""
    error = answer.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""
