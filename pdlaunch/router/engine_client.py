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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

from pdlaunch.http.engine_calls import (
    CONNECT_S,
    MAX_BODY_BYTES,
    MAX_PAGE_BYTES,
    Answer,
    EngineCalls,
    Silence,
)
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER, read_ignored_fields
from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.costs import EngineReport
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.protocol.openai.responses import ModelCard, ModelList
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure, broken_is_failure, refuse_error
from pdlaunch.router.engine_stream import EngineStream

logger = logging.getLogger(__name__)


class EngineTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until the router looks closer or gives up."""

    connect_s: float = CONNECT_S
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
        self._calls = EngineCalls(timeouts.connect_s, tls)
        self._clock = clock
        self._keys = keys
        self._living: dict[str, asyncio.Task[bool]] = {}
        """Questions that are under way, by the name of the engine."""

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
        """Return the answer once its head is here. Raises EngineFailure."""
        key = self._keys if isinstance(self._keys, str) else self._keys(engine)
        own = {"Content-Type": "application/json", **headers}
        if key is not None:
            own["Authorization"] = f"Bearer {key}"
        with broken_is_failure(engine):
            return await self._calls.call(engine.url, method, target, own, body, silence)

    async def ask(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> EngineAnswer:
        """Return the whole answer to a POST. Raises EngineFailure, EngineRefusal."""
        answer = await self._call(engine, "POST", path, body, headers, self._silence(engine))
        try:
            with broken_is_failure(engine):
                whole = await answer.read()
        finally:
            answer.close()
        refuse_error(engine, answer, whole)
        return EngineAnswer(whole, _ignored_fields(answer))

    @contextlib.asynccontextmanager
    async def stream(
        self, engine: Engine, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[EngineStream]:
        """Open a stream (status 200); leaving the block early aborts it at the engine.

        Raises EngineFailure and EngineRefusal, from the block too.
        """
        answer = await self._call(engine, "POST", path, body, headers, self._silence(engine))
        try:
            if answer.status != 200:
                with broken_is_failure(engine):
                    refuse_error(engine, answer, await answer.read())
            stream = EngineStream(
                engine, _ignored_fields(answer), read_some=answer.read_some, hear=self.hear
            )
            yield stream
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
                    with broken_is_failure(engine):
                        whole = await answer.read(max_bytes)
                finally:
                    answer.close()
        except TimeoutError:
            raise EngineFailure(engine, f"no answer within {timeout_s:g} s") from None
        content_type = answer.headers.get("content-type", "application/octet-stream")
        return answer.status, whole, content_type

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
        body = msgspec.json.encode({"request_id": name})
        try:
            await self._call_briefly(engine, "POST", "/pdlaunch/release", body)
        except EngineFailure as failure:
            logger.warning("lease of %s not released: %s", name, failure)

    async def withdraw(self, engine: Engine, name: HopId) -> None:
        """Ask for a prompt back that has not begun; the engine's answer to it says what came of it.

        Errors are logged: then it goes on.
        """
        body = msgspec.json.encode({"request_id": name})
        try:
            await self._call_briefly(engine, "POST", "/pdlaunch/withdraw", body)
        except EngineFailure as failure:
            logger.info("prompt %s not withdrawn: %s", name, failure)

    async def read_spans(self, engine: Engine, name: HopId) -> SpanReport | None:
        """Return what an engine of ours has recorded of a hop whose answer was not waited for."""
        try:
            status, body, _ = await self.call(
                engine,
                "GET",
                "/pdlaunch/spans",
                [("request_id", name)],
                timeout_s=self._timeouts.probe_s,
            )
            return msgspec.json.decode(body, type=SpanReport) if status == 200 else None
        except (EngineFailure, ValueError, RecursionError) as error:
            logger.debug("no spans of %s: %s", name, error)
            return None

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
            await self._call_briefly(decode, "POST", "/v1/completions", msgspec.json.encode(body))
        except EngineFailure as failure:
            logger.warning("a lease is not released: %s", failure)

    async def is_alive(self, engine: Engine) -> bool:
        """Tell whether the engine's server answers.

        An engine that hangs is asked once for all of its streams, which fall silent together.
        """
        asking = self._living.get(engine.name)
        if asking is None:
            asking = self._living[engine.name] = asyncio.ensure_future(self._ask_health(engine))
            asking.add_done_callback(lambda _: self._living.pop(engine.name))
        return await asyncio.shield(asking)

    async def _ask_health(self, engine: Engine) -> bool:
        try:
            status, _, _ = await self._call_briefly(engine, "GET", "/health")
        except EngineFailure:
            return False
        return status == 200

    async def read_models(self, engine: Engine) -> list[ModelCard]:
        """Return what the engine's /v1/models says; nothing when it says nothing."""
        try:
            _, body, _ = await self._call_briefly(engine, "GET", "/v1/models")
            return msgspec.json.decode(body, type=ModelList).data
        except (EngineFailure, ValueError, RecursionError) as error:
            logger.info("%s does not tell its models: %s", engine.name, error)
            return []

    async def read_metrics(self, engine: Engine) -> str | None:
        """Return the engine's /metrics.

        None when it has no address yet, does not answer within ``metrics_s`` or says too much.
        """
        if not engine.url:
            return None
        try:
            status, body, _ = await self.call(
                engine,
                "GET",
                "/metrics",
                timeout_s=self._timeouts.metrics_s,
                max_bytes=MAX_PAGE_BYTES,
            )
        except EngineFailure as failure:
            logger.info("no metrics: %s", failure)
            return None
        return body.decode("utf-8", "replace") if status == 200 else None

    async def _call_briefly(
        self, engine: Engine, method: str, path: str, body: bytes = b""
    ) -> tuple[int, bytes, str]:
        """Make a call that asks for no work, so that a living engine answers within ``probe_s``."""
        return await self.call(
            engine,
            method,
            path,
            body=body,
            timeout_s=self._timeouts.probe_s,
            max_bytes=MAX_PAGE_BYTES,
        )

    def _silence(self, engine: Engine) -> Silence:
        return Silence(self._timeouts.stall_s, partial(self._probe, engine))

    async def _probe(self, engine: Engine) -> None:
        if not await self.is_alive(engine):
            raise EngineFailure(engine, f"silent for {self._timeouts.stall_s:g} s and not healthy")


def _ignored_fields(answer: Answer) -> list[str]:
    return read_ignored_fields(answer.headers.get(IGNORED_FIELDS_HEADER.lower()))
