"""Hit rates of an engine's caches by tier, from what its metrics say."""

from __future__ import annotations

import msgspec

from pdlaunch.bench.serve.engine_counters import EngineCounters

_TIERS = {
    "device": ("prefix_cache_device_hits", "prefix_cache_queries"),
    "host": ("prefix_cache_host_hits", "prefix_cache_queries"),
    "remote": ("prefix_cache_remote_hits", "prefix_cache_queries"),
}
"""By tier: the counters of prompt tokens that it held, and of all prompt tokens."""


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of the engines of one role."""

    role: str
    tier: str
    hit_share: float
    """Of the prompt tokens."""


def tier_rows(counted: EngineCounters) -> list[TierRow]:
    """Tiers that the engines say nothing of are left out."""
    rows = []
    for role in counted.values:
        for tier, (hits_name, queries_name) in _TIERS.items():
            hits, queries = counted.of_role(role, hits_name), counted.of_role(role, queries_name)
            if hits is not None and queries:
                rows.append(TierRow(role=role, tier=tier, hit_share=round(hits / queries, 3)))
    return rows
