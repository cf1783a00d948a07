"""Speaks HTTP to engines: asks for an answer, opens a stream, ends a lease.

Whatever goes wrong becomes one of two errors: an EngineFailure, after which another engine may be
asked, or an EngineRefusal, which is the engine's answer to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import msgspec

from pdlaunch.errors import OverloadedError, PdlaunchError, ProtocolError
from pdlaunch.http.engine_calls import (
    MAX_BODY_BYTES,
    MAX_PAGE_BYTES,
    Answer,
    CallError,
    EngineCalls,
    Silence,
)
from pdlaunch.http.errors import RANK_LOST, RETRY_AFTER_S, RelayedError
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER, read_ignored_fields
from pdlaunch.http.sse import DONE_DATA, EventDecoder
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY, ModelCard, ModelList
from pdlaunch.router.engine import Engine

logger = logging.getLogger(__name__)

Chunk = dict[str, Any]
"""A chunk of an engine's stream; members that the router does not know are passed on."""

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
_GAVE_UP = frozenset({"error", "abort"})
"""Reasons with which an engine gives a request up that nobody has cancelled."""
_CLIENT_ERROR_TYPES = frozenset({"invalid_request_error", "BadRequestError", "NotFoundError"})


class EngineFailure(OverloadedError):
    """An engine did not do its work; another one may.

    ``may_return``: it, or its successor, may be there again soon; the client gets 503, else 502.
    ``turned_away``: it did not begin. ``engine_code``: the code of its own error. ``is_told``: it
    has reported the failure, so it is alive. The engine's own words stand in no message: they may
    quote a prompt.
    """

    def __init__(
        self,
        engine: Engine,
        reason: str,
        *,
        may_return: bool = True,
        turned_away: bool = False,
        engine_code: object = None,
        is_told: bool = False,
    ) -> None:
        super().__init__(
            f"engine {engine.name}: {reason}",
            status=503 if may_return else 502,
            retry_after_s=RETRY_AFTER_S,
            code="engine_failed",
        )
        self.engine = engine
        self.may_return = may_return
        self.turned_away = turned_away
        self.engine_code = engine_code
        self.is_told = is_told and not turned_away and engine_code != RANK_LOST


class EngineRefusal(RelayedError):
    """An engine's answer other than 200, which the client gets as it is."""

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
        self.engine = engine

    @property
    def is_busy(self) -> bool:
        """Return whether another engine, or this one later, may have room."""
        return self.status == 429


def _error_names(error: dict[str, Any]) -> str:
    """Return type and code of an engine's error, in parentheses, as far as these are names."""
    values = [str(error[key]) for key in ("type", "code") if error.get(key) is not None]
    names = [value for value in values if _NAME.fullmatch(value)]
    return f" ({', '.join(names)})" if names else ""


def _refuse_error(engine: Engine, answer: Answer, body: bytes) -> None:
    """Raise EngineFailure or EngineRefusal for an answer that is no 200."""
    if answer.status == 200:
        return
    if answer.status < 300 or 400 <= answer.status < 500:
        content_type = answer.headers.get("content-type", "application/json").partition(";")[0]
        raise EngineRefusal(
            engine,
            status=answer.status,
            body=body,
            content_type=content_type,
            retry_after=answer.headers.get("retry-after"),
        )
    error: Any = None
    with contextlib.suppress(*_MALFORMED):
        error = msgspec.json.decode(body)["error"]
    fields = error if isinstance(error, dict) else {}
    raise EngineFailure(
        engine,
        f"answered {answer.status}{_error_names(fields)}",
        may_return=answer.status in (502, 503, 504),
        turned_away=answer.status == 503,
        engine_code=fields.get("code"),
        is_told=True,
    )


class blames:  # noqa: N801
    """Turn an answer of an engine that is broken or malformed into an EngineFailure.

    Is used as a function; a generator costs three times as much.
    """

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, CallError):
            raise EngineFailure(self._engine, str(error), turned_away=error.not_received) from error
        if isinstance(error, _MALFORMED) and not isinstance(error, PdlaunchError):
            # The error's own words may be the answer's.
            reason = f"malformed answer ({type(error).__name__})"
            raise EngineFailure(self._engine, reason, may_return=False) from error


def refuse_broken(engine: Engine, chunk: Chunk) -> None:
    """Raise EngineFailure for a chunk with which the engine gives the request up."""
    for choice in chunk["choices"]:
        if choice.get("finish_reason") in _GAVE_UP:
            raise EngineFailure(engine, "gave the request up")


class EngineStream:
    """Reads the chunks of one answer, up to ``[DONE]`` or the end of the connection."""

    def __init__(self, engine: Engine, answer: Answer) -> None:
        self.ignored_fields = _ignored_fields(answer)
        self.is_done = False  # it has said ``[DONE]``
        self.report: object = None
        """The engine's spans, once it has sent them, before its end."""
        self._engine = engine
        self._answer = answer
        self._events = EventDecoder()
        self._pending: deque[bytes] = deque()

    @property
    def has_more(self) -> bool:
        """Return whether the next chunk is here, and no error."""
        event = self._pending[0] if self._pending else b""
        return event.startswith(b"{") and not event.startswith(b'{"error"')

    async def next_chunk(self) -> Chunk | None:
        """Return the next chunk, None at the end.

        Raises EngineFailure, or EngineRefusal for an error event about the request.
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
            chunk = msgspec.json.decode(data)
        except (ValueError, RecursionError) as error:
            reason = f"malformed event: {error}"
            raise EngineFailure(self._engine, reason, may_return=False) from error
        if not isinstance(chunk, dict):
            raise EngineFailure(self._engine, "an event that is no object", may_return=False)
        if "error" not in chunk:
            return chunk
        fields = chunk["error"] if isinstance(chunk["error"], dict) else {}
        if fields.get("type") in _CLIENT_ERROR_TYPES:
            raise EngineRefusal(self._engine, status=400, body=data)
        raise EngineFailure(
            self._engine,
            f"error in its stream{_error_names(fields)}",
            may_return=fields.get("type") != "server_error",
            engine_code=fields.get("code"),
            is_told=True,
        )


class EngineTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until the router looks closer or gives up."""

    stall_s: float = 15.0  # silence after which a working engine is asked whether it lives
    probe_s: float = 5.0  # limits the answer to that question, and the release of a lease
    metrics_s: float = 2.0


def keys_of_launch(http_token: str, engine_api_key: str | None) -> Callable[[Engine], str | None]:
    """Return a function that picks the key of an engine; only native ones get the token."""
    return lambda engine: http_token if engine.capabilities.takes_launch_token else engine_api_key


class EngineClient:
    """Sends the router's requests to engines; one object for the process.

    ``keys`` returns the key of an engine, None for one that is sent none. ``tls``: for engines on
    other hosts. Redirects are not followed: an engine must not choose where prompts and keys go.
    """

    def __init__(
        self,
        keys: Callable[[Engine], str | None],
        timeouts: EngineTimeouts,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._keys = keys
        self._timeouts = timeouts
        self._calls = EngineCalls(tls=tls)
        self._probes: dict[str, asyncio.Task[bool]] = {}
        """Questions whether an engine lives that are under way, by its name."""

    async def close(self) -> None:
        await self._calls.close()

    async def _call(
        self,
        engine: Engine,
        method: str,
        target: str,
        body: bytes,
        headers: Mapping[str, str],
        silence: Silence | None = None,
    ) -> Answer:
        own = {"Content-Type": "application/json", **headers}
        if (key := self._keys(engine)) is not None:
            own["Authorization"] = f"Bearer {key}"
        with blames(engine):
            return await self._calls.call(engine.url, method, target, own, body, silence)

    async def _generate(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        silence = Silence(self._timeouts.stall_s, partial(self._probe, engine))
        return await self._call(engine, "POST", path, body, headers, silence)

    async def ask(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, list[str]]:
        """Return the whole answer to a POST, and the names of the fields that were ignored.

        Raises EngineFailure, EngineRefusal.
        """
        answer = await self._generate(engine, path, body, headers)
        try:
            with blames(engine):
                whole = await answer.read()
        finally:
            answer.close()
        _refuse_error(engine, answer, whole)
        return whole, _ignored_fields(answer)

    @contextlib.asynccontextmanager
    async def stream(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[EngineStream]:
        """Open a stream (status 200); leaving the block early aborts it at the engine.

        Raises EngineFailure and EngineRefusal.
        """
        answer = await self._generate(engine, path, body, headers)
        try:
            if answer.status != 200:
                with blames(engine):
                    _refuse_error(engine, answer, await answer.read())
            yield (stream := EngineStream(engine, answer))
        except BaseException:
            answer.close()
            raise
        # A connection with something left to read serves no other call, and closing it is how the
        # engine learns that nobody reads.
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
        """Return status, body and content type of any call.

        Raises EngineFailure when there is no answer, or a larger one.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._call(engine, method, target, body, headers or {})
                try:
                    with blames(engine):
                        whole = await answer.read(max_bytes)
                finally:
                    answer.close()
        except TimeoutError:
            raise EngineFailure(engine, f"no answer within {timeout_s:g} s") from None
        content_type = answer.headers.get("content-type", "application/octet-stream")
        return answer.status, whole, content_type

    async def _call_briefly(
        self, engine: Engine, method: str, path: str, body: bytes = b""
    ) -> tuple[int, bytes]:
        """Make a call that asks for no work, so that a living engine answers within ``probe_s``."""
        timeout_s = self._timeouts.probe_s
        status, answer, _ = await self.call(
            engine, method, path, body=body, timeout_s=timeout_s, max_bytes=MAX_PAGE_BYTES
        )
        return status, answer

    async def release(self, engine: Engine, name: HopId | LeaseId) -> None:
        """End a lease that nobody will pull; after an error it ends by itself."""
        body = msgspec.json.encode({"request_id": name})
        try:
            await self._call_briefly(engine, "POST", "/pdlaunch/release", body)
        except EngineFailure as failure:
            logger.warning("lease of %s not released: %s", name, failure)

    async def refuse_lease(self, decode: Engine, params: Mapping[str, Any]) -> None:
        """Have a decode engine of vLLM end a lease that nobody will pull; errors are logged.

        vLLM has prefill free the blocks of a request that it refuses, as it does a beam search that
        is streamed, before it computes anything.
        """
        body = {"prompt": [0], "max_tokens": 1, "stream": True, "use_beam_search": True}
        body["kv_transfer_params"] = params
        try:
            await self._call_briefly(decode, "POST", "/v1/completions", msgspec.json.encode(body))
        except EngineFailure as failure:
            logger.warning("a lease is not released: %s", failure)

    async def detokenize(
        self, engine: Engine, model: object, token_ids: list[int], headers: dict[str, str]
    ) -> str:
        body = msgspec.json.encode({"model": model, "tokens": token_ids})
        answer, _ = await self.ask(engine, "/detokenize", body, headers)
        return str(msgspec.json.decode(answer)["prompt"])

    async def is_alive(self, engine: Engine) -> bool:
        """Return whether the engine's server answers.

        One question serves all of its streams, which fall silent together.
        """
        probe = self._probes.get(engine.name)
        if probe is None:
            probe = self._probes[engine.name] = asyncio.ensure_future(self._is_healthy(engine))
            probe.add_done_callback(lambda _: self._probes.pop(engine.name))
        return await asyncio.shield(probe)

    async def _is_healthy(self, engine: Engine) -> bool:
        try:
            status, _ = await self._call_briefly(engine, "GET", "/health")
        except EngineFailure:
            return False
        return status == 200

    async def _probe(self, engine: Engine) -> None:
        if not await self.is_alive(engine):
            raise EngineFailure(engine, f"silent for {self._timeouts.stall_s:g} s and not healthy")

    async def read_models(self, engine: Engine) -> list[ModelCard]:
        try:
            _, body = await self._call_briefly(engine, "GET", "/v1/models")
            return msgspec.json.decode(body, type=ModelList).data
        except (EngineFailure, ValueError, RecursionError) as error:
            logger.info("%s does not tell its models: %s", engine.name, error)
            return []

    async def read_spans(self, engine: Engine, name: HopId) -> object:
        """Return what an engine of ours has recorded of a hop whose answer was not waited for."""
        path = f"/pdlaunch/spans?{urlencode({'request_id': name})}"
        try:
            status, body = await self._call_briefly(engine, "GET", path)
            return msgspec.json.decode(body) if status == 200 else None
        except (EngineFailure, ValueError, RecursionError) as error:
            logger.debug("no spans of %s: %s", name, error)
            return None

    async def read_metrics(self, engine: Engine) -> str | None:
        """Return the engine's /metrics; None: no address yet, no answer in time, or too long."""
        if not engine.url:
            return None
        timeout_s, size = self._timeouts.metrics_s, MAX_PAGE_BYTES
        try:
            status, body, _ = await self.call(
                engine, "GET", "/metrics", timeout_s=timeout_s, max_bytes=size
            )
        except EngineFailure as failure:
            logger.info("no metrics: %s", failure)
            return None
        return body.decode("utf-8", "replace") if status == 200 else None


def _ignored_fields(answer: Answer) -> list[str]:
    return read_ignored_fields(answer.headers.get(IGNORED_FIELDS_HEADER.lower()))
