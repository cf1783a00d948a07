"""Put the engines of a running deployment to sleep and wake them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec

from pdlaunch.client.api import Api
from pdlaunch.errors import PdlaunchError


class SleepOutcome(msgspec.Struct, frozen=True):
    """What one engine has answered."""

    engine: str
    is_sleeping: bool
    num_bytes: int = 0
    """Device memory given back or taken."""
    error: str | None = None


def sleep_engines(
    admin: Api, *, level: int, mode: str, names: Sequence[str] = ()
) -> list[SleepOutcome]:
    """Engines of these names, all without; one after the other. Raises PdlaunchError."""
    return _command(admin, "/sleep", [("level", str(level)), ("mode", mode)], names)


def wake_engines(
    admin: Api, *, tags: Sequence[str] = (), names: Sequence[str] = ()
) -> list[SleepOutcome]:
    """Returns when the router uses them again. ``tags``: none are all. Raises PdlaunchError."""
    return _command(admin, "/wake_up", [("tags", tag) for tag in tags], names)


def _command(
    admin: Api, path: str, query: list[tuple[str, str]], names: Sequence[str]
) -> list[SleepOutcome]:
    pairs = [*query, *(("engine", name) for name in names)]
    status, answer = admin.post(f"{path}?{urlencode(pairs)}" if pairs else path, {})
    if "engines" not in answer:
        raise PdlaunchError(f"{path} was refused: {_message(answer) or f'HTTP {status}'}")
    return [_outcome(engine) for engine in answer["engines"]]


def _outcome(answer: dict[str, Any]) -> SleepOutcome:
    if "error" in answer:
        return SleepOutcome(
            answer["engine"], False, error=_message(answer) or "it does not say why"
        )
    return SleepOutcome(answer["engine"], answer["is_sleeping"], answer["num_bytes"])


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""
