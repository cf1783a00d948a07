"""Opens the deployment that a benchmark drives, and reads what its engines count."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.bench.serve.timed_completion import describe_failure, read_refusal
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import check_url

_POLL_S = 0.2
_PATIENCE_S = 3.0  # time to wait for counters: engines report about once a second

Counters = Mapping[tuple[str, str], float]
"""Totals over all engines of a role since they started, by role and name: without ``pdlaunch_`` and
``_total``, and with ``/source`` where there is such a label.
"""


class BenchTarget(msgspec.Struct, frozen=True):
    """Names a deployment that answers."""

    session: aiohttp.ClientSession
    model: str
    max_model_len: int | None  # longest context in tokens; None: the deployment does not say

    def check_length(self, input_tokens: int, output_tokens: int) -> None:
        """Raise PdlaunchError when such a request cannot fit."""
        num_tokens = input_tokens + output_tokens
        if self.max_model_len is None or num_tokens <= self.max_model_len:
            return
        raise PdlaunchError(
            f"a prompt of {input_tokens} tokens and {output_tokens} tokens of output are "
            f"{num_tokens}, but {self.model!r} is served with max_model_len "
            f"{self.max_model_len}: ask for fewer tokens, or serve it with a larger "
            "--max-model-len if the model allows it"
        )

    async def counters(self) -> Counters:
        """Return the counters as they are now; none where there is no such page."""
        try:
            async with self.session.get("/metrics") as response:
                return parse_counters(await response.text()) if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return {}

    async def counted_since(
        self, before: Counters, is_complete: Callable[[Counters], bool]
    ) -> Counters:
        """Return what was added since ``before``, once that is complete, or after a few seconds."""
        deadline_at = time.monotonic() + _PATIENCE_S
        while True:
            found = since(await self.counters(), before)
            if is_complete(found) or time.monotonic() > deadline_at:
                return found
            await asyncio.sleep(_POLL_S)


def total(counters: Counters, name: str) -> float | None:
    """Return the sum over all roles; None: nobody counts it."""
    found = [value for (_, known), value in counters.items() if known == name]
    return sum(found) if found else None


def since(after: Counters, before: Counters) -> Counters:
    """Return what was added; what has restarted meanwhile is left out."""
    return {
        key: value - before[key]
        for key, value in after.items()
        if value >= before.get(key, float("inf"))
    }


def parse_counters(page: str) -> Counters:
    """Read the counters with a label ``role`` from a page in Prometheus's text format.

    Raises ValueError.
    """
    counters: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            role = sample.labels.get("role")
            if family.type == "counter" and role is not None and sample.name.endswith("_total"):
                name = sample.name.removeprefix("pdlaunch_").removesuffix("_total")
                if source := sample.labels.get("source"):
                    name = f"{name}/{source}"
                counters[role, name] = counters.get((role, name), 0.0) + sample.value
    return counters


@contextlib.asynccontextmanager
async def open_target(
    url: str, api_key: str | None, request_timeout_s: float
) -> AsyncIterator[BenchTarget]:
    """Ask the deployment at ``url`` for its model. Raises PdlaunchError when it cannot be used."""
    check_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=request_timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, headers=headers, timeout=timeout, connector=connector
    ) as session:
        yield BenchTarget(session, *await _first_model(session, url))


async def _first_model(session: aiohttp.ClientSession, url: str) -> tuple[str, int | None]:
    """Return the model's name, and the longest context if the deployment says so."""
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise PdlaunchError(f"{response.url} answers {await read_refusal(response)}")
            card = (await response.json(content_type=None))["data"][0]
            max_model_len = card.get("max_model_len")
            return str(card["id"]), max_model_len if isinstance(max_model_len, int) else None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise PdlaunchError(
            f"{url} does not answer /v1/models: {describe_failure(error)}"
        ) from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise PdlaunchError(f"{url} answers /v1/models, but with no list of models") from error
