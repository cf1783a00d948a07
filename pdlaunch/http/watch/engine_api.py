"""Asks an engine over HTTP: whether it is healthy, what it serves, for tokens, what it counts.

Redirects are not followed: an engine must not choose where a key or a prompt goes.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Literal

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import CONNECT_S, MAX_PAGE_BYTES, CallError, EngineCalls

Kind = Literal["native", "vllm"]
"""The program that an engine is; names of metrics follow from it. It is ``config.roles.EngineName``
again, as this room may not import settings.
"""
MAX_WORD_BYTES = 64 * 1024
"""Limits answers that hold a word or none."""
MOST_QUOTED = 200
"""Characters of an error that are passed on: some quote the whole answer."""
VLLM_RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
VLLM_LENT = "vllm:kv_cache_usage_perc"
"""The share of the KV cache that requests or leases hold; the prefix cache alone does not count."""
Models = dict[str, int | None]
"""Names of the models that an engine serves, each with its ``max_model_len``."""


class Counts:
    """Holds one reading of an engine's /metrics."""

    def __init__(self, page: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(page) for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name that have these labels; 0 without any."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def has(self, name: str) -> bool:
        """Return whether there is a sample of this name."""
        return any(sample.name == name for sample in self._samples)

    def label(self, name: str, label: str) -> str | None:
        """Return a label of the first sample of this name."""
        return next(
            (sample.labels.get(label) for sample in self._samples if sample.name == name), None
        )


def is_vllm_busy(counts: Counts) -> bool:
    """Tell whether an engine of vLLM has requests, or blocks that decode engines may still read."""
    return any(counts.total(name) for name in (*VLLM_RUNNING, VLLM_LENT))


class EngineApi:
    """Sends requests to one engine; made and used inside a running event loop."""

    def __init__(self, url: str, key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: what an https URL is called with; else the system's authorities are trusted."""
        self._url = url
        self._calls = EngineCalls(CONNECT_S, tls)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    async def close(self) -> None:
        await self._calls.close()
        # The event loop closes them in its next turn; the one of a command may have no other.
        await asyncio.sleep(0)

    async def is_healthy(self, timeout_s: float) -> bool | None:
        """Return what /health says; None when it says nothing within ``timeout_s``."""
        try:
            status, _ = await self._calls.ask(
                self._url,
                "GET",
                "/health",
                self._headers,
                timeout_s=timeout_s,
                max_bytes=MAX_WORD_BYTES,
            )
        except CallError:
            return None
        return status == 200

    async def counts(self, timeout_s: float) -> Counts:
        """Read /metrics. Raises ProtocolError."""
        page = await self._answer("GET", "/metrics", timeout_s)
        try:
            return Counts(page.decode())
        except ValueError as error:
            raise _malformed("/metrics: not a page of metrics", error) from error

    async def models(self, timeout_s: float) -> Models:
        """Read /v1/models. Raises ProtocolError."""
        raw = await self._answer("GET", "/v1/models", timeout_s)
        try:
            cards = msgspec.json.decode(raw)["data"]
            return {str(card["id"]): card.get("max_model_len") for card in cards}
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise _malformed("/v1/models: not a list of models", error) from error

    async def version(self, timeout_s: float) -> str:
        """Read /version. Raises ProtocolError."""
        raw = await self._answer("GET", "/version", timeout_s, max_bytes=MAX_WORD_BYTES)
        try:
            return str(msgspec.json.decode(raw)["version"])
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise _malformed("/version", error) from error

    async def listed_engines(self, timeout_s: float) -> list[tuple[str, str, str]]:
        """Read role, URL and kind of each engine of a router of pdlaunch. Raises ProtocolError."""
        raw = await self._answer("GET", "/pdlaunch/status", timeout_s)
        try:
            engines = msgspec.json.decode(raw)["engines"]
            return [(str(each["role"]), str(each["url"]), str(each["kind"])) for each in engines]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise _malformed("/pdlaunch/status: not a list of engines", error) from error

    async def server_info(self, timeout_s: float) -> dict[str, Any] | None:
        """Read /server_info, which vLLM has in dev mode alone; None without it."""
        try:
            raw = await self._answer("GET", "/server_info?config_format=json", timeout_s)
            return msgspec.json.decode(raw, type=dict[str, Any])
        except (ProtocolError, ValueError, RecursionError):
            return None

    async def is_sleeping(self, timeout_s: float) -> bool | None:
        """Read /is_sleeping, which vLLM has in dev mode alone; None where nothing is told."""
        try:
            raw = await self._answer("GET", "/is_sleeping", timeout_s, max_bytes=MAX_WORD_BYTES)
            return bool(msgspec.json.decode(raw)["is_sleeping"])
        except (ProtocolError, ValueError, RecursionError, LookupError, TypeError):
            return None

    async def complete(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the answer to /v1/completions. Raises ProtocolError."""
        raw = await self._answer("POST", "/v1/completions", timeout_s, msgspec.json.encode(body))
        try:
            return msgspec.json.decode(raw, type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise _malformed("/v1/completions", error) from error

    async def _answer(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: bytes = b"",
        *,
        max_bytes: int = MAX_PAGE_BYTES,
    ) -> bytes:
        """Return the body of a 200. Raises ProtocolError."""
        try:
            status, raw = await self._calls.ask(
                self._url,
                method,
                path,
                self._headers,
                body,
                timeout_s=timeout_s,
                max_bytes=max_bytes,
            )
        except CallError as error:
            raise ProtocolError(f"{path}: {error}") from error
        if status != 200:
            raise ProtocolError(f"{path} answered {status}: {raw[:300]!r}")
        return raw


def _malformed(what: str, error: Exception) -> ProtocolError:
    reason = "not UTF-8" if isinstance(error, UnicodeError) else repr(error)[:MOST_QUOTED]
    return ProtocolError(f"{what}: {reason}")
