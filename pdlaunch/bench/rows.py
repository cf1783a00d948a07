"""Sums up the requests of one load for ``pdlaunch bench serve``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Sequence

import msgspec

from pdlaunch.bench.loads import BenchLoad
from pdlaunch.bench.timed_completion import Goals, TimedCompletion

_MAX_ERRORS = 3


class PullCounts(msgspec.Struct, frozen=True):
    """Totals of the decode engines' pulls of KV blocks."""

    num_pulls: float
    seconds: float
    num_bytes: float


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one load; None where nothing was measured. Times are those of clients."""

    input_tokens: int  # of a trace: the mean
    concurrency: int | None
    request_rate: float | None = None
    burstiness: float | None = None
    num_requests: int
    num_errors: int
    num_left_out: int = 0
    seconds: float
    requests_per_s: float  # answered without an error
    total_prompt_tokens: int
    total_output_tokens: int  # both of the requests without an error
    goodput_per_s: float | None = None  # requests a second that met the goals
    good_share: float | None = None
    cached_share: float | None = None  # prompt tokens that were not computed
    ttft_ms_median: float | None
    ttft_ms_p99: float | None
    first_gap_ms_median: float | None
    """Between the first token and the second, while KV blocks move from prefill to decode."""
    first_gap_ms_p99: float | None
    itl_ms_median: float | None  # between tokens, from the second token on
    itl_ms_p99: float | None
    e2e_ms_median: float | None
    tpot_ms_median: float | None  # (last token - first token) / (tokens - 1)
    output_tokens_per_s: float
    pull_ms_mean: float | None  # as engines count it
    kv_megabytes_mean: float | None  # size of one pull (10**6 bytes)
    errors: list[str] = []
    """The most frequent error messages of the deployment, with their counts."""

    @property
    def load(self) -> str:
        """Return in words how the requests were sent."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return "as in the trace" if self.request_rate is None else f"{self.request_rate:g} a second"


class BenchRun(msgspec.Struct, frozen=True, kw_only=True):
    """One row, and the requests that it sums up."""

    row: BenchRow
    done: list[TimedCompletion]
    model: str


def summarise(
    load: BenchLoad,
    done: Collection[TimedCompletion],
    seconds: float,
    *,
    pulled: PullCounts | None = None,
    goals: Goals | None = None,
    burstiness: float = 1.0,
) -> BenchRow:
    """Make a row. ``pulled``: pulls during the load; None if the deployment has no such metrics."""
    good = [each for each in done if each.error is None]
    # Requests with a single token have no gap to measure.
    several = [each for each in good if len(each.tokens_at) > 1]
    cached = [each for each in good if each.num_cached_tokens is not None]
    num_within = sum(map(goals.met_by, done)) if goals else None
    # Count equal errors together, so that a thousand of them make one line.
    errors = Counter(each.error for each in done if each.error is not None)
    ttfts_s = [each.ttft_s for each in good]
    first_gaps_s = [each.all_gaps_s[0] for each in several]
    itls_s = [gap_s for each in good for gap_s in each.inter_token_s]
    return BenchRow(
        input_tokens=load.input_tokens,
        concurrency=load.concurrency,
        request_rate=load.request_rate,
        burstiness=None if load.request_rate is None else burstiness,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        num_left_out=load.num_left_out,
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
        itl_ms_median=quantile_ms(itls_s, 0.5),
        itl_ms_p99=quantile_ms(itls_s, 0.99),
        e2e_ms_median=quantile_ms([each.e2e_s for each in good], 0.5),
        tpot_ms_median=quantile_ms(
            [sum(each.all_gaps_s) / (each.num_tokens - 1) for each in several], 0.5
        ),
        output_tokens_per_s=round(sum(each.num_tokens for each in good) / seconds, 1),
        pull_ms_mean=None if pulled is None else _ratio(pulled.seconds * 1e3, pulled.num_pulls, 3),
        kv_megabytes_mean=None
        if pulled is None
        else _ratio(pulled.num_bytes / 1e6, pulled.num_pulls, 3),
        errors=[f"{count} x {reason}" for reason, count in errors.most_common(_MAX_ERRORS)],
    )


def quantile_ms(seconds: Sequence[float], quantile: float) -> float | None:
    """Return a quantile in milliseconds; None without any value."""
    if not seconds:
        return None
    if quantile == 0.5:
        return round(statistics.median(seconds) * 1000, 2)
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000, 2)


def _ratio(value: float | None, of: float, digits: int) -> float | None:
    return round(value / of, digits) if value is not None and of else None


def without_words(errors: Collection[str]) -> list[str]:
    """Reduce errors to ``12 x HTTP 429``: messages may quote prompts, and people share reports."""
    pairs = [error.partition(" x ")[::2] for error in errors]
    return [
        f"{count} x {reason.partition(':')[0] if reason.startswith('HTTP ') else 'no whole answer'}"
        for count, reason in pairs
    ]
