"""Sums up the requests of one length at one concurrency for ``pdlaunch bench serve``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

import msgspec

from pdlaunch.bench.serve.engine_counters import EngineCounters
from pdlaunch.bench.serve.goals import Goals
from pdlaunch.bench.serve.timed_completion import TimedCompletion

GAP_GOAL_OF_ITL = 1.5
_MAX_ERRORS = 3


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the figures of one length at one concurrency; None where nothing was measured."""

    input_tokens: int
    """Length of the prompts; of a trace, their mean."""
    concurrency: int | None
    """Requests at a time; None: they were sent at a rate, or when a trace says."""
    request_rate: float | None = None
    """Requests sent a second."""
    burstiness: float | None = None
    turn: int | None = None
    """Turn of chats: all have their first message, then all have their second one."""
    num_requests: int
    num_errors: int
    num_left_out: int = 0
    """Requests of the trace that the model's context is too short for."""
    seconds: float
    requests_per_s: float
    """Answered without an error."""
    total_prompt_tokens: int
    total_output_tokens: int
    """Both of the requests without an error."""
    goodput_per_s: float | None = None
    """Requests a second that met the goals; None without goals."""
    good_share: float | None = None
    """Share of all requests that met them."""
    ttft_ms_median: float | None
    ttft_ms_p99: float | None
    first_gap_ms_median: float | None
    """Time from the first token to the second, in which KV blocks move from prefill to decode."""
    first_gap_ms_p99: float | None
    itl_ms_median: float | None
    """Time between tokens, from the second on."""
    itl_ms_p99: float | None
    e2e_ms_median: float | None
    """Request to last token."""
    tpot_ms_median: float | None
    """Time per output token of a request: (last token - first token) / (tokens - 1)."""
    together_share: float | None
    """Share of the tokens after the first that came in one read with the one before, 0 ms apart.

    Where it is not small, look at TPOT instead of ITL.
    """
    output_tokens_per_s: float
    pull_ms_mean: float | None
    """Time of the engines' own pulls of KV blocks, as they count them."""
    kv_megabytes_mean: float | None
    """Size of one pull (10**6 bytes)."""
    first_gap_goal_ms: float | None
    """Goal: 1.5 x the median ITL, and what the bare transfer of that many bytes takes."""
    step_output_tokens_per_s: float | None
    """Rate that the bare decode step allows: concurrency / step time."""
    of_step_share: float | None
    """``output_tokens_per_s`` as a share of that rate."""
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
    start_at: float
    """Instant at which the first request was sent, on the clock of ``done``."""
    model: str


def summarise(
    input_tokens: int,
    concurrency: int | None,
    done: Collection[TimedCompletion],
    seconds: float,
    counted: EngineCounters,
    *,
    bare_gb_per_s: float | None = None,
    step_ms: float | None = None,
    goals: Goals | None = None,
    request_rate: float | None = None,
    burstiness: float | None = None,
    num_left_out: int = 0,
    turn: int | None = None,
) -> BenchRow:
    """Make a row.

    ``counted``: by the engines meanwhile. ``bare_gb_per_s``: from ``bench transfer``; ``step_ms``:
    from ``python -m benchmarks.step``.
    """
    good = [completion for completion in done if completion.error is None]
    several = [completion for completion in good if len(completion.tokens_at) > 1]
    gaps_s = [completion.first_gap_s for completion in several]
    itl_s = [gap_s for completion in good for gap_s in completion.inter_token_s]
    itl_ms = quantile_ms(itl_s, 0.5)
    kv_megabytes = _mean(counted.total("kv_transfer_bytes"), counted.total("kv_transfers"), 1e-6)
    tokens_per_s = sum(completion.num_tokens for completion in good) / seconds
    step_tokens_per_s = concurrency / step_ms * 1000 if step_ms and concurrency else None
    num_within = sum(map(goals.met_by, done)) if goals else None
    return BenchRow(
        input_tokens=input_tokens,
        concurrency=concurrency,
        request_rate=request_rate,
        burstiness=burstiness,
        turn=turn,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        num_left_out=num_left_out,
        seconds=round(seconds, 3),
        requests_per_s=round(len(good) / seconds, 3),
        total_prompt_tokens=sum(completion.num_prompt_tokens for completion in good),
        total_output_tokens=sum(completion.num_tokens for completion in good),
        goodput_per_s=None if num_within is None else round(num_within / seconds, 3),
        good_share=None if num_within is None else round(num_within / max(len(done), 1), 4),
        ttft_ms_median=quantile_ms([completion.ttft_s for completion in good], 0.5),
        ttft_ms_p99=quantile_ms([completion.ttft_s for completion in good], 0.99),
        first_gap_ms_median=quantile_ms(gaps_s, 0.5),
        first_gap_ms_p99=quantile_ms(gaps_s, 0.99),
        itl_ms_median=itl_ms,
        itl_ms_p99=quantile_ms(itl_s, 0.99),
        e2e_ms_median=quantile_ms([completion.e2e_s for completion in good], 0.5),
        tpot_ms_median=quantile_ms(
            [(item.tokens_at[-1] - item.tokens_at[0]) / (item.num_tokens - 1) for item in several],
            0.5,
        ),
        together_share=_together_share(several),
        output_tokens_per_s=round(tokens_per_s, 1),
        pull_ms_mean=_mean(
            counted.total("kv_transfer_seconds"), counted.total("kv_transfers"), 1e3
        ),
        kv_megabytes_mean=kv_megabytes,
        first_gap_goal_ms=_gap_goal_ms(itl_ms, kv_megabytes, bare_gb_per_s),
        step_output_tokens_per_s=None if step_tokens_per_s is None else round(step_tokens_per_s, 1),
        of_step_share=None
        if step_tokens_per_s is None
        else round(tokens_per_s / step_tokens_per_s, 3),
        errors=count_errors(done),
    )


def quantile_ms(seconds: Sequence[float], quantile: float) -> float | None:
    """Return a quantile in milliseconds; None without any value."""
    if not seconds:
        return None
    if quantile == 0.5:
        return round(statistics.median(seconds) * 1000, 2)
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000, 2)


def count_errors(done: Collection[TimedCompletion]) -> list[str]:
    """Return the most frequent reasons: ``12 x HTTP 429: the queue is full``."""
    reasons = Counter(completion.error for completion in done if completion.error is not None)
    return [f"{count} x {reason}" for reason, count in reasons.most_common(_MAX_ERRORS)]


def without_words(errors: Collection[str]) -> list[str]:
    """Return ``12 x HTTP 429`` of each such reason: what a deployment says may repeat a prompt, and
    files are passed on.
    """
    pairs = [error.partition(" x ")[::2] for error in errors]
    return [
        f"{count} x {reason.partition(':')[0] if reason.startswith('HTTP ') else 'no whole answer'}"
        for count, reason in pairs
    ]


def _together_share(several: Sequence[TimedCompletion]) -> float | None:
    is_together = [
        late == early for completion in several for early, late in pairwise(completion.tokens_at)
    ]
    return round(sum(is_together) / len(is_together), 4) if is_together else None


def _mean(total: float | None, count: float | None, scale: float) -> float | None:
    return round(total / count * scale, 3) if total is not None and count else None


def _gap_goal_ms(
    itl_ms: float | None, kv_megabytes: float | None, bare_gb_per_s: float | None
) -> float | None:
    """Return the goal of the first gap; megabytes over gigabytes a second are milliseconds."""
    if itl_ms is None or kv_megabytes is None or bare_gb_per_s is None:
        return None
    return round(GAP_GOAL_OF_ITL * itl_ms + kv_megabytes / bare_gb_per_s, 2)
