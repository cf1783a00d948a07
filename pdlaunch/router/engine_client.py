"""Speaks HTTP to engines: asks for an answer, opens a stream, ends a lease.

Whatever goes wrong becomes one of two errors: an EngineFailure, after which another engine may be
asked, or an EngineRefusal, which is the engine's answer to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec
from yarl import URL

from pdlaunch.errors import OverloadedError, ProtocolError
from pdlaunch.http.engine_url import UNIX, http_url, new_session
from pdlaunch.http.errors import RETRY_AFTER_S, RelayedError
from pdlaunch.http.ignored_fields import IGNORED_FIELDS_HEADER, read_ignored_fields
from pdlaunch.http.sse import DONE_DATA, EventDecoder
from pdlaunch.protocol.costs import EngineReport
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY, WORK_KEY, ModelCard, ModelList
from pdlaunch.router.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")
Chunk = dict[str, Any]
"""A chunk of an engine's stream; members that the router does not know are passed on."""

KEEPALIVE_S = 2.0
"""Shorter than any engine's own, so that no request is sent into a connection that is being
closed.
"""
_CLIENT_ERROR_TYPES = frozenset({"invalid_request_error", "BadRequestError", "NotFoundError"})


class EngineTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until the router looks closer or gives up."""

    connect_s: float = 5.0
    stall_s: float = 15.0
    """Silence after which a working engine is asked whether it lives."""
    probe_s: float = 5.0
    """Limits the answer to that question, and the release of a lease."""
    metrics_s: float = 2.0


class EngineAnswer(NamedTuple):
    """Holds an engine's whole answer."""

    body: bytes
    ignored_fields: Sequence[str]
    """Names of the fields that the engine has ignored."""


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


def keys_of_launch(http_token: str, engine_api_key: str | None) -> Callable[[Engine], str | None]:
    """Return what says the key of a launch's engine: its token leaves for none that does not ask
    for it.
    """

    def key_of(engine: Engine) -> str | None:
        return http_token if engine.capabilities.takes_launch_token else engine_api_key

    return key_of


class EngineClient:
    """Sends the router's requests to engines; one object for the process.

    ``keys``: the launch's own token, which its engines ask for; or returns the key of each engine,
    None for one that is sent none. ``tls``: what engines on other hosts are called with. Redirects
    are not followed: an engine must not choose where prompts and keys go.
    """

    def __init__(
        self,
        keys: str | Callable[[Engine], str | None],
        timeouts: EngineTimeouts,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeouts = timeouts
        self._tls = tls
        self._clock = clock
        self._keys = keys
        self._sessions: dict[tuple[str, str | None], aiohttp.ClientSession] = {}
        """One for all TCP ports, under an empty name, and one for each Unix socket; by key."""

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    def _session(self, engine: Engine) -> aiohttp.ClientSession:
        socket = engine.url if engine.url.startswith(UNIX) else ""
        key = self._keys if isinstance(self._keys, str) else self._keys(engine)
        session = self._sessions.get((socket, key))
        if session is None:
            authorization = {} if key is None else {"Authorization": f"Bearer {key}"}
            session = self._sessions[socket, key] = new_session(
                engine.url,
                keepalive_timeout_s=KEEPALIVE_S,
                tls=self._tls,
                timeout=aiohttp.ClientTimeout(total=None, connect=self._timeouts.connect_s),
                headers=authorization | {"Content-Type": "application/json"},
                auto_decompress=True,
                read_bufsize=2**18,
            )
        return session

    async def ask(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> EngineAnswer:
        """Return the whole answer to a POST. Raises EngineFailure, EngineRefusal."""
        return await self._while_alive(engine, self._ask(engine, path, body, headers))

    @contextlib.asynccontextmanager
    async def stream(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[EngineStream]:
        """Open a stream (status 200); leaving the block early aborts it at the engine.

        Raises EngineFailure and EngineRefusal, from the block too.
        """
        response = await self._while_alive(engine, self._open(engine, path, body, headers))
        try:
            yield EngineStream(engine, response, self)
        finally:
            # Closing, not releasing: an unfinished answer must not go back into the pool of
            # connections.
            response.close()

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
    ) -> tuple[int, bytes, str]:
        """Return status, body and content type of any call.

        Raises EngineFailure when there is no answer.
        """
        url = URL(http_url(engine.url)).with_path(path).with_query(list(query))
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s, connect=self._timeouts.connect_s)
            async with self._session(engine).request(
                method,
                url,
                data=body or None,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                return (
                    response.status,
                    await response.read(),
                    response.headers.get("Content-Type", response.content_type),
                )
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _broken(engine, error) from error

    def hear(self, engine: Engine, work: object) -> None:
        """Take what a native engine tells of its work beside an answer."""
        try:
            report = msgspec.convert(work, EngineReport)
        except msgspec.ValidationError as error:
            logger.debug("%s tells its work in a form that is not known: %s", engine.name, error)
        else:
            engine.hear(report, self._clock())

    async def release(self, engine: Engine, name: HopId | LeaseId) -> None:
        """End the lease of a hop that nobody will pull; errors are logged, the lease ends by
        itself.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.probe_s)
            body = msgspec.json.encode({"request_id": name})
            async with self._session(engine).post(
                http_url(engine.url) + "/pdlaunch/release",
                data=body,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("%s: lease of %s not released: %r", engine.name, name, error)

    async def withdraw(self, engine: Engine, name: HopId) -> None:
        """Ask for a prompt back that has not begun; the engine's answer to it says what came of it.

        Errors are logged: then it goes on.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.probe_s)
            async with self._session(engine).post(
                http_url(engine.url) + "/pdlaunch/withdraw",
                data=msgspec.json.encode({"request_id": name}),
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.info("%s: prompt %s not withdrawn: %r", engine.name, name, error)

    async def refuse_lease(self, decode: Engine, params: Mapping[str, Any]) -> None:
        """Have a decode engine of vLLM end a lease that nobody will pull; errors are logged.

        vLLM tells prefill to free the blocks of a request that it refuses, and it refuses a beam
        search that is streamed before it computes anything.
        """
        body = {
            "prompt": [0],
            "max_tokens": 1,
            "stream": True,
            "use_beam_search": True,
            "kv_transfer_params": params,
        }
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.probe_s)
            async with self._session(decode).post(
                http_url(decode.url) + "/v1/completions",
                data=msgspec.json.encode(body),
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.warning("%s: a lease is not released: %r", decode.name, error)

    async def is_alive(self, engine: Engine) -> bool:
        """Tell whether the engine's server answers."""
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.probe_s)
            async with self._session(engine).get(
                http_url(engine.url) + "/health", timeout=timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def read_models(self, engine: Engine) -> list[ModelCard]:
        """Return what the engine's /v1/models says; nothing when it says nothing."""
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.probe_s)
            async with self._session(engine).get(
                http_url(engine.url) + "/v1/models", timeout=timeout, allow_redirects=False
            ) as response:
                return msgspec.json.decode(await response.read(), type=ModelList).data
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            logger.info("%s does not tell its models: %r", engine.name, error)
            return []

    async def read_metrics(self, engine: Engine) -> str | None:
        """Return the engine's /metrics.

        None when it has no address yet or does not answer within ``metrics_s``.
        """
        if not engine.url:
            return None
        try:
            timeout = aiohttp.ClientTimeout(total=self._timeouts.metrics_s)
            async with self._session(engine).get(
                http_url(engine.url) + "/metrics", timeout=timeout, allow_redirects=False
            ) as response:
                return await response.text("utf-8", "replace") if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            logger.info("%s does not tell its metrics: %r", engine.name, error)
            return None

    async def read_some(self, engine: Engine, response: aiohttp.ClientResponse) -> bytes:
        """Return the next bytes of a stream, none at its end.

        Raises EngineFailure when the engine has died or hangs.
        """
        while True:
            try:
                async with asyncio.timeout(self._timeouts.stall_s):
                    return await response.content.readany()
            except TimeoutError:
                await self._probe(engine)
            except aiohttp.ClientError as error:
                raise EngineFailure(engine, f"stream broke: {error!r}") from error

    async def _ask(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> EngineAnswer:
        try:
            async with self._session(engine).post(
                http_url(engine.url) + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                await _refuse_errors(engine, response)
                return EngineAnswer(await response.read(), _ignored_fields(response))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _broken(engine, error) from error

    async def _open(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        try:
            response = await self._session(engine).post(
                http_url(engine.url) + path, data=body, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _broken(engine, error) from error
        try:
            await _refuse_errors(engine, response)
        except BaseException:
            response.close()
            raise
        return response

    async def _while_alive(self, engine: Engine, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``; after each silence of ``stall_s`` make sure that the engine lives."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=self._timeouts.stall_s))[0]:
                await self._probe(engine)
        except BaseException:
            task.add_done_callback(_discard_result)
            task.cancel()
            raise
        try:
            return task.result()
        finally:
            # It holds its error, whose traceback holds this frame.
            del task

    async def _probe(self, engine: Engine) -> None:
        if not await self.is_alive(engine):
            raise EngineFailure(engine, f"silent for {self._timeouts.stall_s:g} s and not healthy")


class EngineStream:
    """Reads the chunks of one answer, up to ``[DONE]`` or the end of the connection."""

    def __init__(
        self, engine: Engine, response: aiohttp.ClientResponse, client: EngineClient
    ) -> None:
        self._engine = engine
        self._response = response
        self._client = client
        self._events = EventDecoder()
        self._pending: deque[bytes] = deque()
        self.ignored_fields = _ignored_fields(response)
        """Names of the fields that the engine has ignored."""
        self.report: object = None
        """The engine's spans, once it has sent them, before its end."""

    async def next_chunk(self) -> Chunk | None:
        """Return the next chunk, None at the end.

        Raises EngineFailure, or EngineRefusal for an error event about the request.
        """
        while (data := await self._next_event()) not in (None, DONE_DATA):
            chunk = self._decode(data)
            if REPORT_KEY not in chunk:
                return chunk
            self.report = chunk[REPORT_KEY]
        return None

    async def _next_event(self) -> bytes | None:
        while not self._pending:
            received = await self._client.read_some(self._engine, self._response)
            if not received:
                return None
            try:
                self._pending.extend(self._events.feed(received))
            except ProtocolError as error:
                raise EngineFailure(self._engine, str(error), may_return=False) from error
        return self._pending.popleft()

    def _decode(self, data: bytes) -> Chunk:
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise EngineFailure(
                self._engine, f"malformed event: {error}", may_return=False
            ) from error
        if not isinstance(chunk, dict):
            raise EngineFailure(self._engine, "an event that is no object", may_return=False)
        if WORK_KEY in chunk:
            self._client.hear(self._engine, chunk.pop(WORK_KEY))
        if "error" in chunk:
            self._raise_error(data, chunk["error"])
        return chunk

    def _raise_error(self, data: bytes, error: object) -> None:
        fields = error if isinstance(error, dict) else {}
        if fields.get("type") in _CLIENT_ERROR_TYPES:
            raise EngineRefusal(self._engine, status=400, body=data)
        message = f"error in its stream: {fields.get('message', error)}"
        raise EngineFailure(
            self._engine,
            message,
            may_return=fields.get("type") != "server_error",
            engine_code=fields.get("code"),
        )


def _discard_result(task: asyncio.Task[Any]) -> None:
    """Work that nobody waits for any more may have ended all the same: close what it opened."""
    if (
        not task.cancelled()
        and task.exception() is None
        and isinstance(task.result(), aiohttp.ClientResponse)
    ):
        task.result().close()


def _broken(
    engine: Engine, error: aiohttp.ClientError | TimeoutError | ValueError
) -> EngineFailure:
    unheard = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    return EngineFailure(engine, repr(error), turned_away=unheard)


def _ignored_fields(response: aiohttp.ClientResponse) -> list[str]:
    return read_ignored_fields(response.headers.get(IGNORED_FIELDS_HEADER))


def _error_code(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)["error"]["code"]
    except (msgspec.DecodeError, LookupError, TypeError):
        return None


async def _refuse_errors(engine: Engine, response: aiohttp.ClientResponse) -> None:
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
