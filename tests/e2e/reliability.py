# ruff: noqa: T201 - a script
"""Repeats the figures of docs/reliability.md: ``python -m tests.e2e.reliability soak | kills | cancels``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path

from pdlaunch.client.soak import SoakOptions, SoakReport, soak
from tests.e2e.faults import faulty_deployment, load_with_kills
from tests.e2e.tiny_models import make_tiny_model

FAMILIES = ("llama", "gemma3_text")
NUM_KILLS = 4
"""As many as a supervisor forgives in a row."""
SCENARIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prefill": ("prefill-0/rank-0", ()),
    "decode": ("decode-0/rank-0", ()),
    "one of three decode ranks": ("decode-0/rank-1", ("--decode-tp", "3")),
    "decode's server": ("decode-0", ()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("soak", "kills", "cancels"))
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.15, help="share of READs that meet a fault")
    parser.add_argument("--family", choices=FAMILIES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {family: make_tiny_model(family, Path(folder)) for family in FAMILIES if options.family in (None, family)}
        if options.what == "kills":
            return run_kills(models["llama"], options.seed)
        if options.what == "cancels":
            return run_cancels(models["llama"], options.seed, options.requests or 1000)
        return max(run_soak(model, options.seed, options.requests or 3000, options.rate) for model in models.values())


def run_soak(model: Path, seed: int, num_requests: int, rate: float) -> int:
    """Every fault, cancels, and kills of the engines' ranks in turn, so rarely that the supervisor forgets the one before."""
    with faulty_deployment(model, {"seed": seed, "rate": rate, "lost_s": 3}) as deployment:
        options = SoakOptions(url=deployment.url, seed=seed, num_requests=num_requests, concurrency=12, num_cases=64)
        pause_s = 25, 60
        names = ["prefill-0/rank-0", "decode-0/rank-0"] * 100
        report, kills = asyncio.run(load_with_kills(deployment, options, names, random.Random(seed), pause_s=pause_s))
        print(f"{model.name}: {len(kills)} kills")
        return show(model.name, report)


def run_kills(model: Path, seed: int) -> int:
    """Default options; one deployment for each kind of process."""
    code = 0
    for title, (name, arguments) in SCENARIOS.items():
        with faulty_deployment(model, None, *arguments, environ={}) as deployment:
            options = SoakOptions(
                url=deployment.url,
                seed=seed,
                num_requests=10**6,
                concurrency=6,
                longest_prompt_tokens=100,
                longest_output_tokens=300,
                cancel_share=0,
            )
            names = [name] * NUM_KILLS
            report, kills = asyncio.run(load_with_kills(deployment, options, names, random.Random(seed), pause_s=(2, 6)))
            print("| killed | kill | in flight | lost | longest gap (s) | ready again (s) |")
            for number, kill in enumerate(kills, start=1):
                seen = f"{kill.num_in_flight} | {kill.num_lost} | {kill.longest_gap_s:.1f} | {kill.ready_s:.1f}"
                print(f"| {title} | {number} | {seen} |")
            code |= show(title, report) or bool(report.outcomes["error"])
    return code


def run_cancels(model: Path, seed: int, num_requests: int) -> int:
    """Default options; every client goes away, at a random moment."""
    with faulty_deployment(model, None, environ={}) as deployment:
        options = SoakOptions(
            url=deployment.url,
            seed=seed,
            num_requests=num_requests,
            concurrency=16,
            longest_output_tokens=300,
            cancel_share=1,
            longest_patience_s=0.6,
        )
        return show("cancels", asyncio.run(soak(options)))


def show(title: str, report: SoakReport) -> int:
    """Print a report; returns the exit code."""
    print(f"{title}: {report.num_requests} requests in {report.seconds:.0f} s, slowest {report.longest_s:g} s")
    print(f"  outcomes: {dict(report.outcomes)}")
    print(f"  totals: {json.dumps(report.totals)}")
    for line in [*report.details, *report.left]:
        print(f"  {line}")
    sys.stdout.flush()
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
