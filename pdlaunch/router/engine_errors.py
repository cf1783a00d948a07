"""Names the two ways in which an engine does not do its work, and tells them apart.

After an EngineFailure another engine may be asked; an EngineRefusal is the engine's answer to the
client.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

import msgspec

from pdlaunch.errors import OverloadedError, PdlaunchError
from pdlaunch.http.engine_calls import Answer, CallError
from pdlaunch.http.errors import RANK_LOST, RETRY_AFTER_S, RelayedError
from pdlaunch.router.engine import Engine

MAX_QUOTE_BYTES = 200
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)


class EngineFailure(OverloadedError):
    """Tells that an engine did not do its work; another one may.

    ``may_return``: it, or its successor, may be there again soon. ``turned_away``: it did not even
    begin. ``engine_code``: the code of its own error. ``is_told``: it has told of its failure, so
    that it lives. ``quote``: how its own words begin, which may be those of a prompt and stand in
    no message. If no other engine makes up for it, the client is told 503, or 502 when the engine
    may not return.
    """

    def __init__(
        self,
        engine: Engine,
        reason: str,
        *,
        may_return: bool = True,
        turned_away: bool = False,
        engine_code: object = None,
        quote: str = "",
        is_told: bool = False,
    ) -> None:
        super().__init__(
            f"engine {engine.name}: {reason}",
            status=503 if may_return else 502,
            retry_after_s=RETRY_AFTER_S,
            code="engine_failed",
        )
        self.may_return = may_return
        self.turned_away = turned_away
        self.engine_code = engine_code
        self.quote = quote
        self.is_told = is_told and not turned_away and engine_code != RANK_LOST


class EngineRefusal(RelayedError):
    """Carries an engine's answer that is no 200, for the client as it is."""

    def __init__(
        self,
        engine: Engine,
        *,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        retry_after: str | None = None,
    ) -> None:
        super().__init__(
            f"engine {engine.name} answered {status}",
            status=status,
            body=body,
            content_type=content_type,
            headers={} if retry_after is None else {"Retry-After": retry_after},
        )

    @property
    def is_busy(self) -> bool:
        """Tell whether another engine, or this one later, may have room."""
        return self.status == 429


def error_names(error: dict[str, Any]) -> str:
    """Return type and code of an engine's error, in parentheses, as far as these are names."""
    values = [str(error[key]) for key in ("type", "code") if error.get(key) is not None]
    names = [value for value in values if _NAME.fullmatch(value)]
    return f" ({', '.join(names)})" if names else ""


def _error_of(body: bytes) -> dict[str, Any]:
    try:
        error = msgspec.json.decode(body)["error"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def refuse_error(engine: Engine, answer: Answer, body: bytes) -> None:
    """Raise EngineFailure or EngineRefusal for an answer that is no 200."""
    if answer.status == 200:
        return
    if answer.status >= 500 or 300 <= answer.status < 400:
        error_fields = _error_of(body)
        may_return = answer.status in (502, 503, 504)
        raise EngineFailure(
            engine,
            f"answered {answer.status}{error_names(error_fields)}",
            may_return=may_return,
            turned_away=answer.status == 503,
            engine_code=error_fields.get("code"),
            quote=body[:MAX_QUOTE_BYTES].decode(errors="replace"),
            is_told=True,
        )
    raise EngineRefusal(
        engine,
        status=answer.status,
        body=body,
        content_type=answer.headers.get("content-type", "application/json").partition(";")[0],
        retry_after=answer.headers.get("retry-after"),
    )


# Those below are used as functions; generators cost three times as much.
class _Asking:
    """Is entered for what one engine is asked."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        return


class broken_is_failure(_Asking):  # noqa: N801
    """Turn an answer that did not come, or not to its end, into an EngineFailure."""

    __slots__ = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, CallError):
            raise EngineFailure(self._engine, str(error), turned_away=error.unheard) from error


class malformed_is_failure(_Asking):  # noqa: N801
    """Turn what reading an answer of another form raises into an EngineFailure."""

    __slots__ = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, _MALFORMED) and not isinstance(error, PdlaunchError):
            # The error's own words may be the answer's.
            reason = f"malformed answer ({type(error).__name__})"
            raise EngineFailure(self._engine, reason, may_return=False, quote=str(error)) from error
