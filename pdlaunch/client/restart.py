"""Have engines of a running deployment started anew."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec

from pdlaunch.client.api import Api


class RestartOutcome(msgspec.Struct, frozen=True):
    """Tells what became of one engine."""

    engine: str
    error: str | None = None
    """None: it serves again."""


def restart_engine(admin: Api, name: str) -> RestartOutcome:
    """``name``: of an engine or one of its processes. Returns when it serves again, or why not.
    Raises PdlaunchError.
    """
    status, answer = admin.post(f"/pdlaunch/restart?{urlencode({'engine': name})}", {})
    if status == 200:
        return RestartOutcome(answer["engines"][0]["engine"])
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return RestartOutcome(name, str(message or f"HTTP {status}"))
