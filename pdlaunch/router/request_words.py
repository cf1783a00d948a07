"""Says of requests and errors what may be written down: no engine's own words, nothing long."""

from __future__ import annotations

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.http.errors import RelayedError
from pdlaunch.observe.logs import escape_controls

CLIENT_LEFT = "the client went away"
MAX_ERROR_LENGTH = 300
MAX_CONTENT_LENGTH = 200
"""Characters of a prompt and of an output that are logged with ``log_content``."""


def cut_content(text: str) -> str:
    """Return the beginning of a prompt or an output, as a log may show it."""
    return escape_controls(text)[:MAX_CONTENT_LENGTH]


def describe_error(error: BaseException) -> str:
    """Say what went wrong.

    An engine's refusal may quote the prompt: what it says beside its status is left out.
    """
    if isinstance(error, ConnectionError) or not isinstance(error, Exception):
        return CLIENT_LEFT
    if isinstance(error, RelayedError):
        return _relayed(error)
    if not isinstance(error, RequestError):
        return type(error).__name__
    text = f"{error.code}: {error}" if error.code else str(error)
    return text[:MAX_ERROR_LENGTH]


def _relayed(error: RelayedError) -> str:
    """Name what an engine's answer names: its code and the parameter, not its message."""
    try:
        body = msgspec.json.decode(error.body)["error"]
        named = [str(body[key]) for key in ("code", "param") if body.get(key)]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        named = []
    return ": ".join([str(error), *named])[:MAX_ERROR_LENGTH]
