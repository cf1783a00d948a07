"""Names the two ways in which an engine does not do its work, and tells them apart.

After an EngineFailure another engine may be asked; an EngineRefusal is the engine's answer to the
client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import aiohttp
import msgspec

from pdlaunch.errors import OverloadedError, PdlaunchError
from pdlaunch.http.errors import RETRY_AFTER_S, RelayedError
from pdlaunch.router.engine import Engine

_MALFORMED = (msgspec.DecodeError, LookupError, TypeError, AttributeError, ValueError)


class EngineFailure(OverloadedError):
    """Tells that an engine did not do its work; another one may.

    ``may_return``: it, or its successor, may be there again soon. ``turned_away``: it did not even
    begin. ``engine_code``: the code of its own error. If no other engine makes up for it, the
    client is told 503, or 502 when the engine may not return.
    """

    def __init__(
        self,
        engine: Engine,
        reason: str,
        *,
        may_return: bool = True,
        turned_away: bool = False,
        engine_code: object = None,
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


def broken(engine: Engine, error: aiohttp.ClientError | TimeoutError | ValueError) -> EngineFailure:
    """Return the failure of an engine whose connection gave no answer."""
    unheard = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    return EngineFailure(engine, repr(error), turned_away=unheard)


def _error_code(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)["error"]["code"]
    except (msgspec.DecodeError, LookupError, TypeError):
        return None


async def require_ok(engine: Engine, response: aiohttp.ClientResponse) -> None:
    """Raise EngineFailure or EngineRefusal for an answer that is no 200."""
    if response.status == 200:
        return
    try:
        body = await response.read()
    except aiohttp.ClientError as error:
        raise EngineFailure(engine, f"answered {response.status} and broke off") from error
    if response.status >= 500 or 300 <= response.status < 400:
        text = body[:200].decode(errors="replace")
        message = f"answered {response.status}: {text}"
        may_return = response.status in (502, 503, 504)
        raise EngineFailure(
            engine,
            message,
            may_return=may_return,
            turned_away=response.status == 503,
            engine_code=_error_code(body),
        )
    raise EngineRefusal(
        engine,
        status=response.status,
        body=body,
        content_type=response.content_type,
        retry_after=response.headers.get("Retry-After"),
    )


@contextlib.contextmanager
def malformed_is_failure(engine: Engine) -> Iterator[None]:
    """Turn what reading an answer of another form raises into an EngineFailure."""
    try:
        yield
    except PdlaunchError:
        raise
    except _MALFORMED as error:
        raise EngineFailure(engine, f"malformed answer: {error!r}", may_return=False) from error
