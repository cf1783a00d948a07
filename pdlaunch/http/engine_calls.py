"""Calls engines over HTTP/1.1 with aiohttp's client; used by routers, sidecars and canaries.

Redirects, cookies, proxies and compression are off: an engine must not decide where a prompt or a
key is sent.
"""

import asyncio
import io
import math
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp.http_exceptions import ContentLengthError, HttpProcessingError
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from pdlaunch.config.external import UNIX
from pdlaunch.errors import ProtocolError
from pdlaunch.http.headers import DATA_PARALLEL_HEADER
from pdlaunch.protocol.control import Capabilities

CONNECT_S = 5.0
# Largest status or metrics page of an engine. vLLM's /metrics has up to 300 kB; parsing 4 MiB
# takes a second.
MAX_PAGE_BYTES = 4 * 1024**2
MAX_BODY_BYTES = 1024**3
# Shorter than the keep-alive of any engine, so no request is sent on a connection being closed
KEEPALIVE_S = 2.0
# How long a stream may take to end after ``[DONE]``; later, its connection is closed, not reused
END_S = 1.0
# Errors of code that reads an answer which has not the expected form
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
MOST_QUOTED = 200  # characters of an error to keep: some errors quote the whole answer
VLLM_RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
# Share of the KV cache that requests or leases hold, without blocks that are only cached
VLLM_LENT = "vllm:kv_cache_usage_perc"
# First vLLM with ``return_token_ids``, from which the router knows the tokens so far
TELLS_TOKEN_IDS_SINCE = (0, 11)
# ``max_model_len`` of the models that an engine serves, by name
Models = dict[str, int | None]
# Role, URL and name of each engine; and for each pair ``PREFILL -> DECODE`` its path with its
# speed, and why it is slow (empty: it is not)
Deployment = tuple[list[tuple[str, str, str]], dict[str, tuple[str, str]]]
T = TypeVar("T")
_HIGH_WATER_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024
_RAW_BODY_BYTES = 1024**2


class CallError(Exception):
    """Raised for a call without a complete answer; the reason quotes no request or answer."""

    def __init__(self, reason: str, *, not_received: bool = False) -> None:
        super().__init__(reason)
        self.not_received = not_received  # the engine cannot have received the request


class Answer:
    """Reads an answer whose headers have arrived. One task at a time; must be closed or left."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def read_some(self) -> bytes:
        try:
            return await self._response.content.readany()
        except Exception as error:
            raise _broken(error, "in the middle of its answer") from None

    async def read(self, max_bytes: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body. Raises CallError, also if it exceeds ``max_bytes``."""
        pieces, num_bytes = [], 0
        while piece := await self.read_some():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise CallError(f"its answer has more than {max_bytes} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Close the connection, unless the answer is complete, so that the engine stops working."""
        # Abort: unsent bytes of a long request would keep the connection open.
        if (connection := self._response.connection) is not None and connection.transport:
            connection.transport.abort()
        self._response.close()

    def leave(self) -> None:
        """Keep the connection for reuse if the answer ends within END_S, as after ``[DONE]``."""
        if self._response.connection is not None:
            asyncio.get_running_loop().call_later(END_S, self._response.close)


@dataclass(eq=False)
class EngineCalls:
    """Holds the connections of a process to engines. Must be closed."""

    connect_s: float = CONNECT_S
    tls: ssl.SSLContext | None = None  # for https; None trusts the system's authorities
    # By path of a Unix socket; the empty path is for all TCP connections.
    _sessions: dict[str, aiohttp.ClientSession] = field(default_factory=dict)

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def call(
        self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """Send a request; return its answer once the headers are there. Raises CallError."""
        base = "http://localhost" if url.startswith(UNIX) else url.rstrip("/")
        try:
            response = await self._session(url).request(
                method,
                URL(base + target, encoded=True),
                headers=headers,
                # aiohttp copies a long ``bytes`` body at each write, and warns about it.
                data=body if len(body) <= _RAW_BODY_BYTES else io.BytesIO(body),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            late = f"no connection within {self.connect_s:g} s"
            reason = late if isinstance(error, TimeoutError) else f"cannot connect: {error}"
            raise CallError(reason, not_received=True) from None
        except (ValueError, aiohttp.InvalidURL) as error:
            raise CallError(f"the request cannot be sent: {error}", not_received=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error, "without an answer") from None
        return Answer(response)

    async def ask(
        self,
        url: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        timeout_s: float | None,
        max_bytes: int,
    ) -> tuple[int, bytes, str]:
        """Return status, body and content type of a complete answer. Raises CallError."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.call(url, method, target, headers, body)
                try:
                    kind = answer.headers.get("content-type", "application/octet-stream")
                    return answer.status, await answer.read(max_bytes), kind
                finally:
                    answer.close()
        except TimeoutError:
            raise CallError(f"no answer within {timeout_s:g} s") from None

    def _session(self, url: str) -> aiohttp.ClientSession:
        path = url.removeprefix(UNIX) if url.startswith(UNIX) else ""
        if (known := self._sessions.get(path)) is not None:
            return known
        connector: aiohttp.BaseConnector
        if path:
            connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
        else:
            tls = self.tls or True
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=tls)
        session = self._sessions[path] = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=self.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_HIGH_WATER_BYTES,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
        )
        return session


def _broken(error: BaseException, when: str) -> CallError:
    """Return the error for an incomplete answer, without aiohttp's text, which may quote it."""
    cause = error if isinstance(error, aiohttp.ClientResponseError) else error.__cause__
    is_cut = isinstance(cause, ContentLengthError) or "Not enough data" in str(cause)
    if isinstance(cause, aiohttp.ClientResponseError | HttpProcessingError) and not is_cut:
        return CallError("its answer is not valid HTTP")
    return CallError(f"it closed the connection {when}")


class Counts:
    def __init__(self, page: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(page) for sample in family.samples
        ]

    def total(self, *names: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in self._samples
            if sample.name in names and labels.items() <= sample.labels.items()
        )

    def has(self, *names: str) -> bool:
        return any(sample.name in names for sample in self._samples)

    def label(self, name: str, label: str) -> str | None:
        return next(
            (sample.labels.get(label) for sample in self._samples if sample.name == name), None
        )

    @property
    def kv_cache_tokens(self) -> int:
        """Return at most how many tokens fit into vLLM's KV caches; 0: unknown."""
        wanted = ("num_gpu_blocks", "block_size")
        told = (self.label("vllm:cache_config_info", name) or "" for name in wanted)
        return math.prod(int(each) if each.isdecimal() else 0 for each in told)


class FailedReads:
    """Detects from the metrics of a vLLM engine that all of its READs fail."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None  # failed READs and bytes at the last call

    def look(self, counts: Counts) -> bool:
        failed = counts.total("vllm:nixl_num_failed_transfers_total")
        num_bytes = counts.total("vllm:nixl_bytes_transferred_sum")
        before, self._before = self._before, (failed, num_bytes)
        return before is not None and failed > before[0] and num_bytes <= before[1]


def is_vllm_busy(counts: Counts) -> bool:
    """Return True if a vLLM engine has requests, or blocks that decode engines may still read."""
    return any(counts.total(name) for name in (*VLLM_RUNNING, VLLM_LENT))


def with_version(capabilities: Capabilities, version: str) -> Capabilities:
    """Return the capabilities updated for an engine's ``version``, such as ``0.32.0+cpu``."""
    known = msgspec.structs.replace(capabilities, version=version)
    if capabilities.kind != "vllm":
        return known
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return msgspec.structs.replace(known, continues=numbers >= TELLS_TOKEN_IDS_SINCE)


class EngineApi:
    """Sends requests to one engine. ``prefix`` begins each path, if a router forwards the calls.
    Create and use it inside a running event loop.
    """

    def __init__(
        self, url: str, key: str | None = None, tls: ssl.SSLContext | None = None, prefix: str = ""
    ) -> None:
        self._url, self._prefix = url, prefix
        self._calls = EngineCalls(tls=tls)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    async def close(self) -> None:
        await self._calls.close()

    async def is_healthy(self, timeout_s: float) -> bool | None:
        """Return True if /health answers 200; None if there is no answer within ``timeout_s``."""
        try:
            status, _ = await self._ask("/health", timeout_s)
        except CallError:
            return None
        return status == 200

    async def counts(self, timeout_s: float) -> Counts:
        """Read /metrics. Raises ProtocolError, as do ``models``, ``version`` and the like."""
        return await self._read("/metrics", timeout_s, lambda page: Counts(page.decode()))

    async def models(self, timeout_s: float) -> Models:
        def read(raw: bytes) -> Models:
            cards = msgspec.json.decode(raw)["data"]
            return {str(card["id"]): card.get("max_model_len") for card in cards}

        return await self._read("/v1/models", timeout_s, read)

    async def version(self, timeout_s: float) -> str:
        return await self._read(
            "/version", timeout_s, lambda raw: str(msgspec.json.decode(raw)["version"])
        )

    async def deployment(self, timeout_s: float) -> Deployment:
        def read(raw: bytes) -> Deployment:
            found, pairs = msgspec.json.decode(raw), {}
            for each in found["pairs"]:
                speed = each["gigabytes_per_s"]
                told = str(each["path"]) + ("" if speed is None else f", {speed:.2f} GB/s")
                pairs[f"{each['prefill']} -> {each['decode']}"] = told, str(each["slow"])
            return [
                (str(each["role"]), str(each["url"]), str(each.get("name", "")))
                for each in found["engines"]
            ], pairs

        return await self._read("/pdlaunch/status", timeout_s, read)

    async def server_info(self, timeout_s: float) -> dict[str, Any] | None:
        """Read /server_info, which vLLM has only in dev mode; None if it cannot be read."""
        try:
            return await self._read("/server_info?config_format=json", timeout_s, _json_object)
        except ProtocolError:
            return None

    async def is_sleeping(self, timeout_s: float) -> bool | None:
        """Read /is_sleeping, which vLLM has only in dev mode; None if it cannot be read."""
        try:
            return await self._read(
                "/is_sleeping", timeout_s, lambda raw: bool(_json_object(raw)["is_sleeping"])
            )
        except ProtocolError:
            return None

    async def complete(
        self, body: dict[str, Any], timeout_s: float, dp_rank: int | None = None
    ) -> dict[str, Any]:
        """Return a completion. ``dp_rank``: data parallel rank of vLLM; None: vLLM chooses."""
        sent = msgspec.json.encode(body)
        headers = {} if dp_rank is None else {DATA_PARALLEL_HEADER: str(dp_rank)}
        return await self._read("/v1/completions", timeout_s, _json_object, sent, headers)

    async def _read(
        self,
        path: str,
        timeout_s: float,
        read: Callable[[bytes], T],
        body: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> T:
        try:
            status, raw = await self._ask(path, timeout_s, body, headers)
        except CallError as error:
            raise ProtocolError(f"{path}: {error}") from error
        if status != 200:
            raise ProtocolError(f"{path} answered {status}: {raw[:300]!r}")
        try:
            return read(raw)
        except MALFORMED as error:
            reason = "not UTF-8" if isinstance(error, UnicodeError) else repr(error)[:MOST_QUOTED]
            raise ProtocolError(f"{path}: unexpected content: {reason}") from error

    async def _ask(
        self,
        path: str,
        timeout_s: float,
        body: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, bytes]:
        method, target = "POST" if body else "GET", f"{self._prefix}{path}"
        sent = {**self._headers, **headers}
        status, answer, _ = await self._calls.ask(
            self._url, method, target, sent, body, timeout_s=timeout_s, max_bytes=MAX_PAGE_BYTES
        )
        return status, answer


def _json_object(raw: bytes) -> dict[str, Any]:
    return msgspec.json.decode(raw, type=dict[str, Any])
