"""Speaks HTTP to engines: requests answers, opens streams, releases leases.

Every error becomes an EngineFailure, after which another engine may be asked, or an EngineRefusal,
which is the engine's answer to the client.
"""

import contextlib
import logging
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any
from urllib.parse import urlencode

import msgspec

from pdlaunch.errors import OverloadedError, PdlaunchError, ProtocolError
from pdlaunch.http.engine_calls import (
    MALFORMED,
    MAX_BODY_BYTES,
    MAX_PAGE_BYTES,
    Answer,
    CallError,
    EngineCalls,
)
from pdlaunch.http.errors import RANK_LOST, RETRY_AFTER_S, RelayedError
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, read_feed
from pdlaunch.http.sse import DONE_DATA, EventDecoder
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.openai.responses import REPORT_KEY
from pdlaunch.router.engine import Engine

logger = logging.getLogger(__name__)

# A chunk of an engine's stream. Members that the router does not know are passed on to the client.
Chunk = dict[str, Any]

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Finish reasons of requests that the engine, not a client, has given up.
_GAVE_UP = frozenset({"error", "abort"})
_CLIENT_ERROR_TYPES = frozenset({"invalid_request_error", "BadRequestError", "NotFoundError"})


class EngineFailure(OverloadedError):
    """An engine failed a request; another may succeed. Never quotes ``error``, the engine's own."""

    def __init__(
        self,
        engine: Engine,
        reason: str,
        *,
        may_return: bool = True,
        turned_away: bool = False,
        error: object = None,
    ) -> None:
        fields = error if isinstance(error, dict) else {}
        values = [str(fields[key]) for key in ("type", "code") if fields.get(key) is not None]
        names = ", ".join(value for value in values if _NAME.fullmatch(value))
        super().__init__(
            f"engine {engine.name}: {reason}" + (f" ({names})" if names else ""),
            status=503 if may_return else 502,
            retry_after_s=RETRY_AFTER_S,
            code="engine_failed",
        )
        self.engine = engine
        self.may_return = may_return  # the engine or its successor may be back soon
        self.turned_away = turned_away  # the engine did not begin
        self.lost_rank = fields.get("code") == RANK_LOST
        # The engine reported the failure, so it is alive.
        self.is_reported = error is not None and not turned_away and not self.lost_rank


class EngineRefusal(RelayedError):
    """An engine's answer with a status other than 200, passed on to the client unchanged."""

    turned_away = True

    def __init__(
        self, engine: Engine, status: int, body: bytes, headers: Mapping[str, str]
    ) -> None:
        super().__init__(f"engine {engine.name} answered {status}", status, body, headers)
        self.engine = engine

    @property
    def is_busy(self) -> bool:
        return self.status == 429


def _refuse_error(engine: Engine, answer: Answer, body: bytes) -> None:
    status, error = answer.status, None
    if status == 200:
        return
    if status < 300 or 400 <= status < 500:
        raise EngineRefusal(engine, status, body, answer.headers)
    with contextlib.suppress(*MALFORMED):
        error = msgspec.json.decode(body)["error"]
    raise EngineFailure(
        engine,
        f"answered {status}",
        may_return=status in (502, 503, 504),
        turned_away=status == 503,
        error=error or {},
    )


@contextlib.contextmanager
def blames(engine: Engine) -> Iterator[None]:
    """Turn a broken connection or a malformed answer of an engine into an EngineFailure."""
    try:
        yield
    except PdlaunchError:
        raise
    except CallError as error:
        raise EngineFailure(engine, str(error), turned_away=error.not_received) from error
    except MALFORMED as error:
        # Name only the type: the error's message may quote the answer.
        reason = f"malformed answer ({type(error).__name__})"
        raise EngineFailure(engine, reason, may_return=False) from error


def refuse_broken(engine: Engine, chunk: Chunk) -> None:
    """Raise EngineFailure if the chunk says that the engine has given the request up."""
    for choice in chunk["choices"]:
        if choice.get("finish_reason") in _GAVE_UP:
            raise EngineFailure(engine, "gave up the request")


class EngineStream:
    """Reads the chunks of one answer, up to ``[DONE]`` or the end of the connection.

    ``whole``: a whole answer, which becomes one chunk with all of its fields.
    """

    def __init__(self, engine: Engine, answer: Answer, whole: bytes | None = None) -> None:
        self.ignored_fields = _ignored_fields(answer)
        self.is_done = False  # the engine has sent ``[DONE]``
        self.report: object = None  # the engine's spans, sent before ``[DONE]``
        self._engine = engine
        self._answer = answer
        self._events = EventDecoder()
        self._pending: deque[bytes] = deque()
        if whole is not None:
            chunk: Chunk = msgspec.json.decode(whole)
            chunk.pop("kv_transfer_params", None)
            for choice in chunk["choices"]:
                if "message" in choice:
                    choice["delta"] = choice.pop("message")
            self._pending.extend((msgspec.json.encode(chunk), DONE_DATA))

    @property
    def has_more(self) -> bool:
        event = self._pending[0] if self._pending else b""
        return event.startswith(b"{") and not event.startswith(b'{"error"')

    async def next_chunk(self) -> Chunk | None:
        """Return the next chunk; None at the end. Raises EngineFailure, or EngineRefusal for an
        error event about the request.
        """
        while (data := await self._next_event()) is not None and data != DONE_DATA:
            chunk = self._decode(data)
            if REPORT_KEY not in chunk:
                return chunk
            self.report = chunk[REPORT_KEY]
        self.is_done = data is not None
        return None

    async def _next_event(self) -> bytes | None:
        while not self._pending:
            try:
                received = await self._answer.read_some()
                if not received:
                    return None
                self._pending.extend(self._events.feed(received))
            except CallError as error:
                raise EngineFailure(self._engine, f"stream broke: {error}") from error
            except ProtocolError as error:
                raise EngineFailure(self._engine, str(error), may_return=False) from error
        return self._pending.popleft()

    def _decode(self, data: bytes) -> Chunk:
        try:
            chunk = msgspec.json.decode(data, type=Chunk)
        except (ValueError, RecursionError) as error:
            reason = f"malformed event: {error}"
            raise EngineFailure(self._engine, reason, may_return=False) from error
        if "error" not in chunk:
            return chunk
        told = chunk["error"]
        kind = told.get("type") if isinstance(told, dict) else None
        if kind in _CLIENT_ERROR_TYPES:
            raise EngineRefusal(self._engine, 400, data, {})
        may_return, reason = kind != "server_error", "error in its stream"
        raise EngineFailure(self._engine, reason, may_return=may_return, error=told or {})


@dataclass(eq=False)
class EngineClient:
    """Sends the router's requests to engines, each with the key that ``key_of`` returns for it."""

    key_of: Callable[[Engine], str | None]
    tls: InitVar[ssl.SSLContext | None] = None
    probe_s: float = 5.0  # time-out of calls that compute nothing
    metrics_s: float = 2.0

    def __post_init__(self, tls: ssl.SSLContext | None) -> None:
        self._calls = EngineCalls(tls=tls)

    async def close(self) -> None:
        await self._calls.close()

    async def ask(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, list[str]]:
        """Return the whole answer to a POST, and the names of the fields that were ignored."""
        async with _while_alive(engine):
            answer = await self._post(engine, path, body, headers)
            try:
                with blames(engine):
                    whole = await answer.read()
            finally:
                answer.close()
            _refuse_error(engine, answer, whole)
            return whole, _ignored_fields(answer)

    @contextlib.asynccontextmanager
    async def stream(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str], *, is_whole: bool
    ) -> AsyncIterator[EngineStream]:
        """Open a stream, or an answer that ``is_whole``; leaving the block early aborts it."""
        async with _while_alive(engine):
            answer = await self._post(engine, path, body, headers)
            try:
                with blames(engine):
                    whole = await answer.read() if is_whole or answer.status != 200 else None
                    _refuse_error(engine, answer, whole or b"")
                    stream = EngineStream(engine, answer, whole)
                yield stream
            except BaseException:
                answer.close()
                raise
            # A connection with unread data cannot be used for another call. Closing it tells the
            # engine to abort the request.
            if stream.is_done:
                answer.leave()
            else:
                answer.close()

    async def call(
        self,
        engine: Engine,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> tuple[int, bytes, str]:
        """Return status, body and content type of any call. Raises EngineFailure."""
        target, own = f"{path}?{urlencode(query)}" if query else path, self._own(engine, headers)
        with blames(engine):
            return await self._calls.ask(
                engine.url, method, target, own, body, timeout_s=timeout_s, max_bytes=max_bytes
            )

    async def notify(self, engine: Engine, path: str, message: object) -> None:
        """Send a message that may get lost, such as a release: a lease also expires by itself."""
        body, timeout_s = msgspec.json.encode(message), self.probe_s
        try:
            await self.call(engine, "POST", path, body=body, timeout_s=timeout_s)
        except EngineFailure as failure:
            logger.warning("%s was not delivered: %s", path, failure)

    async def read(self, engine: Engine, path: str, timeout_s: float | None = None) -> bytes | None:
        """Return the body of an engine's answer of 200 to GET, else None."""
        if not engine.url:
            return None
        timeout_s = timeout_s or self.probe_s
        try:
            status, body, _ = await self.call(
                engine, "GET", path, timeout_s=timeout_s, max_bytes=MAX_PAGE_BYTES
            )
        except EngineFailure as failure:
            logger.info("%s cannot be read: %s", path, failure)
            return None
        return body if status == 200 else None

    async def follow(self, engine: Engine) -> AsyncIterator[KVBlocks]:
        """Yield the KV events of an engine. Raises EngineFailure, CallError, ProtocolError."""
        with blames(engine):
            answer = await self._calls.call(
                engine.kv_events, "GET", KV_EVENTS_PATH, self._own(engine, None), b""
            )
        try:
            if answer.status == 200:
                async for change in read_feed(answer):
                    yield change
        finally:
            answer.close()

    async def tokenize(
        self, engine: Engine, fields: dict[str, Any], headers: dict[str, str]
    ) -> list[int]:
        answer, _ = await self.ask(engine, "/tokenize", msgspec.json.encode(fields), headers)
        with blames(engine):
            return msgspec.convert(msgspec.json.decode(answer)["tokens"], list[int])

    async def read_metrics(self, engine: Engine) -> str | None:
        page = await self.read(engine, "/metrics", self.metrics_s)
        return None if page is None else page.decode("utf-8", "replace")

    async def detokenize(
        self, engine: Engine, model: object, headers: dict[str, str], token_ids: list[int]
    ) -> str:
        body = msgspec.json.encode({"model": model, "tokens": token_ids})
        answer, _ = await self.ask(engine, "/detokenize", body, headers)
        return str(msgspec.json.decode(answer)["prompt"])

    async def _post(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        own = self._own(engine, headers)
        with blames(engine):
            return await self._calls.call(engine.url, "POST", path, own, body)

    def _own(self, engine: Engine, headers: Mapping[str, str] | None) -> dict[str, str]:
        own = {"Content-Type": "application/json", **(headers or {})}
        if (key := self.key_of(engine)) is not None:
            own["Authorization"] = f"Bearer {key}"
        return own


def _while_alive(engine: Engine) -> contextlib.AbstractAsyncContextManager[None]:
    """Return a context manager that raises EngineFailure in the block if the engine is given up."""
    return engine.calls.guard(None, lambda: EngineFailure(engine, "does not answer any more"))


def _ignored_fields(answer: Answer) -> list[str]:
    header = answer.headers.get(IGNORED_FIELDS_HEADER.lower())
    return header.split(", ") if header else []
