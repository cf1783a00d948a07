"""Reads what a deployment's engines count from the router's ``/metrics``.

What is not there is None, as with other servers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

_POLL_S = 0.2
_PATIENCE_S = 3.0
"""Time to wait for counters: engines report about once a second."""


class EngineCounters(msgspec.Struct, frozen=True):
    """Holds totals over all engines of a role since they started."""

    values: dict[str, dict[str, float]] = {}
    """Totals by role and name, which is without ``pdlaunch_`` and ``_total``, and with
    ``/source`` where there is such a label.
    """

    def total(self, name: str) -> float | None:
        """Return the sum over all roles."""
        found = [counters[name] for counters in self.values.values() if name in counters]
        return sum(found) if found else None

    def of_role(self, role: str, name: str) -> float | None:
        """Return the sum over the engines of one role."""
        return self.values.get(role, {}).get(name)

    def since(self, before: EngineCounters) -> EngineCounters:
        """Return what was added since ``before``; what has restarted meanwhile is left out."""
        return EngineCounters(
            {
                role: {
                    name: value - before.values[role][name]
                    for name, value in counters.items()
                    if value >= before.values.get(role, {}).get(name, float("inf"))
                }
                for role, counters in self.values.items()
            }
        )


async def read_counters(session: aiohttp.ClientSession) -> EngineCounters:
    """Return the counters as they are now; none where there is no such page."""
    try:
        async with session.get("/metrics") as response:
            return (
                parse_counters(await response.text())
                if response.status == 200
                else EngineCounters()
            )
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return EngineCounters()


async def counters_when(
    session: aiohttp.ClientSession,
    is_complete: Callable[[EngineCounters], bool],
    patience_s: float = _PATIENCE_S,
) -> EngineCounters:
    """Return the counters once all that is awaited was counted, or as they are after
    ``patience_s``.
    """
    deadline_at = time.monotonic() + patience_s
    while True:
        counters = await read_counters(session)
        if is_complete(counters) or time.monotonic() > deadline_at:
            return counters
        await asyncio.sleep(_POLL_S)


def parse_counters(page: str) -> EngineCounters:
    """Read the counters with a label ``role`` from a page in Prometheus's text format.

    Raises ValueError.
    """
    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            role = sample.labels.get("role")
            if family.type == "counter" and role is not None and sample.name.endswith("_total"):
                counters = values.setdefault(role, {})
                name = sample.name.removeprefix("pdlaunch_").removesuffix("_total")
                if source := sample.labels.get("source"):
                    name = f"{name}/{source}"
                counters[name] = counters.get(name, 0.0) + sample.value
    return EngineCounters(values)


_TIERS = {
    "device": ("prompt_tokens_cached_by_source/device", "prefix_cache_queries"),
    "host": ("prompt_tokens_cached_by_source/host", "prefix_cache_queries"),
    "remote": ("prompt_tokens_cached_by_source/p2p", "prefix_cache_queries"),
}
"""Names, for each tier, the counters of prompt tokens that it held, and of all prompt tokens."""


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tells the hit rate of one cache tier of the engines of one role."""

    role: str
    tier: str
    hit_share: float
    """Share of the prompt tokens that the tier held."""


def tier_rows(counted: EngineCounters) -> list[TierRow]:
    """Make the rows of all tiers; those that the engines say nothing of are left out."""
    rows = []
    for role in counted.values:
        for tier, (hits_name, queries_name) in _TIERS.items():
            hits, queries = counted.of_role(role, hits_name), counted.of_role(role, queries_name)
            if hits is not None and queries:
                rows.append(TierRow(role=role, tier=tier, hit_share=round(hits / queries, 3)))
    return rows
