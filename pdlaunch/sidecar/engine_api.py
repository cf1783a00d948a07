"""Asks an engine of vLLM over HTTP: whether it is healthy, for tokens, for what it counts."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_url import http_url, new_session


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

    def label(self, name: str, label: str) -> str | None:
        """Return a label of the first sample of this name."""
        return next(
            (sample.labels.get(label) for sample in self._samples if sample.name == name), None
        )


class EngineApi:
    """Sends requests to one engine; made and used inside a running event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = http_url(url)
        self._session = new_session(
            url,
            keepalive_timeout_s=2.0,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
        )

    async def close(self) -> None:
        await self._session.close()

    async def is_healthy(self, timeout_s: float) -> bool | None:
        """Return what /health says; None when it says nothing within ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s), self._session.get(f"{self._url}/health") as it:
                return it.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def counts(self, timeout_s: float) -> Counts:
        """Read /metrics. Raises ProtocolError."""
        try:
            async with asyncio.timeout(timeout_s), self._session.get(f"{self._url}/metrics") as it:
                return Counts(await it.text())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ProtocolError(f"/metrics: {error!r}") from error

    async def complete(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return the answer to /v1/completions. Raises ProtocolError."""
        data = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(
                    f"{self._url}/v1/completions", data=data, headers=headers
                ) as response,
            ):
                raw = await response.read()
                if response.status != 200:
                    raise ProtocolError(f"answered {response.status}: {raw[:300]!r}")
                answer: dict[str, Any] = msgspec.json.decode(raw)
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ProtocolError(f"/v1/completions: {error!r}") from error
