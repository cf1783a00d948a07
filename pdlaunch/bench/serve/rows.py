"""Sums up the requests of one load for ``pdlaunch bench serve``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from pdlaunch.bench.serve.target import Counters, total
from pdlaunch.bench.serve.timed_completion import Goals, TimedCompletion

GAP_GOAL_OF_ITL = 1.5
_MAX_ERRORS = 3
_TIERS = {"device": "device", "host": "host", "remote": "p2p"}
"""Source of cached prompt tokens in the counters, by cache tier."""


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the figures of one load; None where nothing was measured."""

    input_tokens: int  # length of the prompts; of a trace, their mean
    concurrency: int | None
    """Requests at a time; None: they were sent at a rate, or when a trace says."""
    request_rate: float | None = None  # requests sent a second
    burstiness: float | None = None
    turn: int | None = None
    """Turn of chats: all have their first message, then all have their second one."""
    num_requests: int
    num_errors: int
    num_left_out: int = 0  # requests of the trace that the model's context is too short for
    seconds: float
    requests_per_s: float  # answered without an error
    total_prompt_tokens: int
    total_output_tokens: int  # both of the requests without an error
    goodput_per_s: float | None = None  # requests a second that met the goals; None without goals
    good_share: float | None = None  # share of all requests that met them
    cached_share: float | None = None
    """Share of the prompt tokens that were not computed, where the answers say so."""
    ttft_ms_median: float | None
    ttft_ms_p99: float | None
    first_gap_ms_median: float | None
    """Time from the first token to the second, in which KV blocks move from prefill to decode."""
    first_gap_ms_p99: float | None
    itl_ms_median: float | None  # time between tokens, from the second on
    itl_ms_p99: float | None
    e2e_ms_median: float | None  # request to last token
    tpot_ms_median: float | None
    """Time per output token of a request: (last token - first token) / (tokens - 1)."""
    together_share: float | None
    """Share of the tokens after the first that came in one read with the one before, 0 ms apart.

    Where it is not small, look at TPOT instead of ITL.
    """
    output_tokens_per_s: float
    pull_ms_mean: float | None  # time of the engines' own pulls of KV blocks, as they count them
    kv_megabytes_mean: float | None  # size of one pull (10**6 bytes)
    first_gap_goal_ms: float | None
    """Goal: 1.5 x the median ITL, and what the bare transfer of that many bytes takes."""
    step_output_tokens_per_s: float | None
    """Rate that the bare decode step allows: concurrency / step time."""
    of_step_share: float | None  # ``output_tokens_per_s`` as a share of that rate
    errors: list[str] = []
    """The most frequent errors, as the deployment worded them, with their counts."""

    @property
    def load(self) -> str:
        """Return in words how the requests were sent."""
        if self.turn is not None:
            return f"turn {self.turn}, {self.concurrency} at once"
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return "as in the trace" if self.request_rate is None else f"{self.request_rate:g} a second"


class BenchRun(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one row, and the requests that it sums up."""

    row: BenchRow
    done: list[TimedCompletion]
    model: str


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tells the hit rate of one cache tier of the engines of one role."""

    role: str
    tier: str
    hit_share: float  # share of the prompt tokens that the tier held


def summarise(
    input_tokens: int,
    concurrency: int | None,
    done: Collection[TimedCompletion],
    seconds: float,
    counted: Counters,
    *,
    bare_gb_per_s: float | None = None,
    step_ms: float | None = None,
    goals: Goals | None = None,
    **load: Any,
) -> BenchRow:
    """Make a row. ``counted``: by the engines meanwhile; ``load``: further fields of the row."""
    good = [each for each in done if each.error is None]
    several = [each for each in good if len(each.tokens_at) > 1]
    gaps_s = [gap_s for each in several for gap_s in each.all_gaps_s]
    first_gaps_s = [each.all_gaps_s[0] for each in several]
    tpots_s = [sum(each.all_gaps_s) / (each.num_tokens - 1) for each in several]
    ttfts_s, itls_s = [each.ttft_s for each in good], [s for e in good for s in e.inter_token_s]
    cached = [each for each in good if each.num_cached_tokens is not None]
    num_pulls, pull_s = total(counted, "kv_transfers"), total(counted, "kv_transfer_seconds")
    itl_ms = quantile_ms(itls_s, 0.5)
    megabytes = _ratio(total(counted, "kv_transfer_bytes"), num_pulls, 3, 1e-6)
    gap_goal_ms = None
    if itl_ms is not None and megabytes is not None and bare_gb_per_s is not None:
        # Megabytes over gigabytes a second are milliseconds.
        gap_goal_ms = round(GAP_GOAL_OF_ITL * itl_ms + megabytes / bare_gb_per_s, 2)
    tokens_per_s = sum(each.num_tokens for each in good) / seconds
    step_tokens_per_s = concurrency / step_ms * 1000 if step_ms and concurrency else None
    num_within = sum(map(goals.met_by, done)) if goals else None
    errors = Counter(each.error for each in done if each.error is not None)
    return BenchRow(
        input_tokens=input_tokens,
        concurrency=concurrency,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        seconds=round(seconds, 3),
        requests_per_s=round(len(good) / seconds, 3),
        total_prompt_tokens=sum(each.num_prompt_tokens for each in good),
        total_output_tokens=sum(each.num_tokens for each in good),
        goodput_per_s=_ratio(num_within, seconds, 3),
        good_share=_ratio(num_within, max(len(done), 1), 4),
        cached_share=_ratio(
            sum(each.num_cached_tokens or 0 for each in cached),
            sum(each.num_prompt_tokens for each in cached),
            3,
        ),
        ttft_ms_median=quantile_ms(ttfts_s, 0.5),
        ttft_ms_p99=quantile_ms(ttfts_s, 0.99),
        first_gap_ms_median=quantile_ms(first_gaps_s, 0.5),
        first_gap_ms_p99=quantile_ms(first_gaps_s, 0.99),
        itl_ms_median=itl_ms,
        itl_ms_p99=quantile_ms(itls_s, 0.99),
        e2e_ms_median=quantile_ms([each.e2e_s for each in good], 0.5),
        tpot_ms_median=quantile_ms(tpots_s, 0.5),
        together_share=_ratio(gaps_s.count(0.0), len(gaps_s), 4),
        output_tokens_per_s=round(tokens_per_s, 1),
        pull_ms_mean=_ratio(pull_s, num_pulls, 3, 1e3),
        kv_megabytes_mean=megabytes,
        first_gap_goal_ms=gap_goal_ms,
        step_output_tokens_per_s=_ratio(step_tokens_per_s, 1, 1),
        of_step_share=_ratio(tokens_per_s, step_tokens_per_s, 3),
        errors=[f"{count} x {reason}" for reason, count in errors.most_common(_MAX_ERRORS)],
        **load,
    )


def quantile_ms(seconds: Sequence[float], quantile: float) -> float | None:
    """Return a quantile in milliseconds; None without any value."""
    if not seconds:
        return None
    if quantile == 0.5:
        return round(statistics.median(seconds) * 1000, 2)
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000, 2)


def _ratio(value: float | None, of: float | None, digits: int, scale: float = 1.0) -> float | None:
    return round(value / of * scale, digits) if value is not None and of else None


def without_words(errors: Collection[str]) -> list[str]:
    """Return ``12 x HTTP 429`` of each such reason: what a deployment says may repeat a prompt, and
    files are passed on.
    """
    pairs = [error.partition(" x ")[::2] for error in errors]
    return [
        f"{count} x {reason.partition(':')[0] if reason.startswith('HTTP ') else 'no whole answer'}"
        for count, reason in pairs
    ]


def tier_rows(counted: Counters) -> list[TierRow]:
    """Make the rows of all cache tiers of which the engines tell."""
    rows = []
    for role in dict.fromkeys(role for role, _ in counted):
        for tier, source in _TIERS.items():
            hits = counted.get((role, f"prompt_tokens_cached_by_source/{source}"))
            share = _ratio(hits, counted.get((role, "prefix_cache_queries")), 3)
            if share is not None:
                rows.append(TierRow(role=role, tier=tier, hit_share=share))
    return rows


def vllm_result(run: BenchRun) -> dict[str, Any]:
    """Return a row as ``vllm bench serve --save-result`` writes it, for tools that read that.

    Names and meanings are those of vLLM 0.32: times in ms, the first gap is one of the ITLs. What
    has no meaning here is null, as it is there.
    """
    row = run.row
    good = [each for each in run.done if each.error is None]
    start_at = min((each.start_at for each in good), default=0.0)
    by_second = Counter(int(at - start_at) for each in good for at in each.tokens_at)
    changes = [(each.start_at, 1) for each in good] + [
        (each.start_at + each.e2e_s, -1) for each in good
    ]
    num_open = most_open = 0
    for _, change in sorted(changes):
        num_open += change
        most_open = max(most_open, num_open)
    tpots_s = [sum(each.all_gaps_s) / (each.num_tokens - 1) for each in good if each.num_tokens > 1]
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": run.model,
        "tokenizer_id": run.model,
        "num_prompts": row.num_requests,
        "request_rate": "inf" if row.request_rate is None else row.request_rate,
        "burstiness": row.burstiness or 1.0,
        "max_concurrency": row.concurrency,
        "duration": row.seconds,
        "completed": len(good),
        "failed": row.num_errors,
        "total_input_tokens": row.total_prompt_tokens,
        "total_output_tokens": row.total_output_tokens,
        "request_throughput": len(good) / row.seconds,
        "request_goodput": row.goodput_per_s,
        "output_throughput": row.total_output_tokens / row.seconds,
        "total_token_throughput": (row.total_prompt_tokens + row.total_output_tokens) / row.seconds,
        "max_output_tokens_per_s": float(max(by_second.values(), default=0)),
        "max_concurrent_requests": most_open,
        "rtfx": 0.0,
        **_vllm_figures("ttft", [each.ttft_s for each in good]),
        **_vllm_figures("tpot", tpots_s),
        **_vllm_figures("itl", [gap_s for each in good for gap_s in each.all_gaps_s]),
    }


def _vllm_figures(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, median, deviation and 99th percentile in ms; 0 without any value."""
    ordered = sorted(seconds) or [0.0]
    # As numpy interpolates.
    place = 0.99 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return {
        f"mean_{name}_ms": statistics.fmean(ordered) * 1000,
        f"median_{name}_ms": statistics.median(ordered) * 1000,
        f"std_{name}_ms": statistics.pstdev(ordered) * 1000,
        f"p99_{name}_ms": (low + (high - low) * (place % 1)) * 1000,
    }
