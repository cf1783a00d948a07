"""Writes what was measured as ``vllm bench serve --save-result`` does, for tools that read that.

Names and meanings are those of vLLM 0.32: times in ms, the first gap is one of the ITLs. What has
no meaning here is null, as it is there.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pdlaunch.bench.serve.row import BenchRun
from pdlaunch.bench.serve.timed_completion import TimedCompletion


def vllm_result(run: BenchRun) -> dict[str, Any]:
    """Return the result of one row as a JSON object."""
    row = run.row
    good = [completion for completion in run.done if completion.error is None]
    num_tokens = sum(completion.num_tokens for completion in good)
    num_prompt_tokens = sum(completion.num_prompt_tokens for completion in good)
    tpots_s = [
        (item.e2e_s - item.ttft_s) / (item.num_tokens - 1) for item in good if item.num_tokens > 1
    ]
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
        "total_input_tokens": num_prompt_tokens,
        "total_output_tokens": num_tokens,
        "request_throughput": len(good) / row.seconds,
        "request_goodput": row.goodput_per_s,
        "output_throughput": num_tokens / row.seconds,
        "total_token_throughput": (num_prompt_tokens + num_tokens) / row.seconds,
        "max_output_tokens_per_s": float(max(_tokens_by_second(good).values(), default=0)),
        "max_concurrent_requests": _most_open(good),
        "rtfx": 0.0,
        **_figures("ttft", [completion.ttft_s for completion in good]),
        **_figures("tpot", tpots_s),
        **_figures("itl", [gap_s for completion in good for gap_s in completion.all_gaps_s]),
    }


def _figures(name: str, seconds: Sequence[float]) -> dict[str, float]:
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


def _tokens_by_second(done: Sequence[TimedCompletion]) -> Counter[int]:
    start_at = min((completion.start_at for completion in done), default=0.0)
    return Counter(int(at - start_at) for completion in done for at in completion.tokens_at)


def _most_open(done: Sequence[TimedCompletion]) -> int:
    """Return how many requests were open at once, at most."""
    changes = [(item.start_at, 1) for item in done] + [
        (item.start_at + item.e2e_s, -1) for item in done
    ]
    num_open = most = 0
    for _, change in sorted(changes):
        num_open += change
        most = max(most, num_open)
    return most
