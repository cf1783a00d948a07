"""Calls an engine's HTTP API: health, metrics, models, version, sleep state and completions."""

import math
import re
import ssl
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import MALFORMED, MAX_PAGE_BYTES, CallError, EngineCalls
from pdlaunch.http.headers import DATA_PARALLEL_HEADER
from pdlaunch.protocol.control import Capabilities

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


class Counts:
    def __init__(self, page: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(page) for sample in family.samples
        ]

    def total(self, *names: str, **labels: str) -> float:
        """Return the sum of the samples with one of these names and all of these labels."""
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
        """Return True if READs have failed since the last call and none has succeeded."""
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
    """Sends requests to one engine. ``prefix`` begins each path, if a router forwards the calls."""

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
        """Read a pdlaunch router's status."""

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
        """Return ``read(body)`` for an answer with status 200. Raises ProtocolError."""
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
