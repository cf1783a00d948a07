# ruff: noqa: T201 - a script
"""Measures the figures of docs/reliability.md: ``python -m benchmarks.reliability
soak | kills | cancels``.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kills import Kill, load_with_kills
from benchmarks.known_answers import SoakOptions, SoakReport, soak
from tests.e2e.faults import SHORT_DEADLINES, faulty_deployment
from tests.e2e.tiny_models import make_tiny_model

FAMILIES = ("llama", "gemma3_text")
HOST_TIER = ("--kv-cache-memory", "500KiB", "--kv-offload-memory", "2MiB")
"""So small that requests preempt each other, and blocks move between device and host."""
LOAD = {"PDLAUNCH_ROUTING": "load"}
NUM_KILLS = 4
"""The most deaths in a row after which a supervisor still restarts a process."""
MOST_REQUESTS_A_CANCEL = 10
"""If more requests are needed for a cancel, answers are too fast to be cancelled."""


@dataclass(frozen=True)
class Scenario:
    title: str
    process: str
    """Several processes at once are joined by ``+``."""
    arguments: tuple[str, ...] = ()
    signal_number: int = signal.SIGKILL
    loses: bool = False
    """True for the router: its streams end when it dies."""

    @property
    def environ(self) -> dict[str, str]:
        stops = self.signal_number == signal.SIGSTOP
        return LOAD | ({"PDLAUNCH_HANG_TIMEOUT_S": "10"} if stops else {})


ONE_RANK = (
    Scenario("prefill's rank", "prefill-0/rank-0"),
    Scenario("decode's rank", "decode-0/rank-0"),
    Scenario("one of three decode TP ranks", "decode-0/rank-1", ("--decode-tp", "3")),
)
SCENARIOS = (
    *ONE_RANK,
    Scenario("prefill's server", "prefill-0"),
    Scenario("decode's server", "decode-0"),
    Scenario("prefill's and decode's rank at once", "prefill-0/rank-0+decode-0/rank-0"),
    Scenario(
        "all four ranks of two pairs at once",
        "prefill-0/rank-0+prefill-1/rank-0+decode-0/rank-0+decode-1/rank-0",
        ("--prefill", "2", "--decode", "2"),
    ),
    Scenario("decode's rank and its server at once", "decode-0/rank-0+decode-0"),
    Scenario("prefill's rank and decode's server at once", "prefill-0/rank-0+decode-0"),
    Scenario("the router", "router", loses=True),
    Scenario("the router and decode's rank at once", "router+decode-0/rank-0", loses=True),
    *(
        replace(each, title=f"{each.title}, stopped", signal_number=signal.SIGSTOP)
        for each in ONE_RANK
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("soak", "kills", "cancels"))
    parser.add_argument(
        "--requests", type=int, help="how many; of cancels: clients that have gone away"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", default="", help="kills: the scenario of this title, or all with this in theirs"
    )
    parser.add_argument("--path", default="auto", help="kv_transfer.nixl.path of the soak")
    parser.add_argument(
        "--host-tier",
        action="store_true",
        help="soak with a small KV cache over a tier in host memory",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {family: make_tiny_model(family, Path(folder)) for family in FAMILIES}
        if options.what == "kills":
            return run_kills(models["llama"], options)
        if options.what == "cancels":
            return run_cancels(models["llama"], options)
        return max(run_soak(model, options) for model in models.values())


def run_soak(model: Path, asked: argparse.Namespace) -> int:
    """Inject all faults, cancel requests and kill ranks in turn, so rarely that the supervisor
    forgets earlier deaths.
    """
    seed, num_requests = asked.seed, asked.requests or 10_000
    arguments = HOST_TIER if asked.host_tier else ()
    # Route through pairs: more READs can meet a fault.
    environ = SHORT_DEADLINES | {"PDLAUNCH_KV_TRANSFER__NIXL__PATH": asked.path}
    faults = {"seed": seed, "rate": 0.15, "lost_s": 3}
    with faulty_deployment(model, faults, *arguments, environ=environ) as deployment:
        options = SoakOptions(
            url=deployment.url, seed=seed, num_requests=num_requests, concurrency=12, num_cases=64
        )
        pause_s = 25, 60
        names = ["prefill-0/rank-0", "decode-0/rank-0"] * 100
        report, kills = asyncio.run(
            load_with_kills(deployment, options, names, random.Random(seed), pause_s=pause_s)
        )
        print(f"{model.name}: {len(kills)} kills")
        return show(model.name, report)


def run_kills(model: Path, asked: argparse.Namespace) -> int:
    """Run each scenario in its own deployment with default options. Print the rows of the table in
    docs/reliability.md.
    """
    seed = asked.seed
    code, num_requests, num_migrations = 0, 0, 0.0
    chosen = [each for each in SCENARIOS if asked.only == each.title] or [
        each for each in SCENARIOS if asked.only in each.title
    ]
    for scenario in chosen:
        names, source = [scenario.process] * NUM_KILLS, random.Random(seed)
        how = {"pause_s": (2, 6), "signal_number": scenario.signal_number}
        arguments = scenario.arguments
        with faulty_deployment(model, None, *arguments, environ=scenario.environ) as deployment:
            options = SoakOptions(
                url=deployment.url,
                seed=seed,
                num_requests=10**6,
                concurrency=6,
                longest_prompt_tokens=100,
                longest_output_tokens=300,
                cancel_share=0,
                wants_pairs=False,
            )
            load = load_with_kills(deployment, options, names, source, **how)
            report, kills = asyncio.run(load)
        failed = show(scenario.title, report) or bool(report.outcomes["error"])
        code |= failed and not scenario.loses
        print(table_row(scenario.title, kills), flush=True)
        num_requests += report.num_requests
        num_migrations += report.totals["router_migrations"]
    print(f"{num_requests} requests; {num_migrations:g} answers went on at another engine")
    return code


def table_row(title: str, kills: Sequence[Kill]) -> str:
    gaps = ", ".join(f"{kill.longest_gap_s:.1f}" for kill in kills)
    ready = ", ".join(f"{kill.ready_s:.1f}" for kill in kills)
    return (
        f"| {title} | {sum(kill.num_in_flight for kill in kills)} | "
        f"{sum(kill.num_lost for kill in kills)} | {gaps} | {ready} |"
    )


def run_cancels(model: Path, asked: argparse.Namespace) -> int:
    """With default options, every client leaves at a random moment. Clients that have their whole
    answer by then do not count.
    """
    num_cancels = asked.requests or 1000
    with faulty_deployment(model, None, environ=LOAD) as deployment:
        options = SoakOptions(
            url=deployment.url,
            seed=asked.seed,
            num_requests=MOST_REQUESTS_A_CANCEL * num_cancels,
            num_cancels=num_cancels,
            concurrency=16,
            longest_output_tokens=300,
            cancel_share=1,
            wants_pairs=False,
            longest_patience_s=0.6,
        )
        report = asyncio.run(soak(options))
        return show("cancels", report) or int(report.outcomes["cancelled"] < num_cancels)


def show(title: str, report: SoakReport) -> int:
    """Print a report; return the exit code."""
    print(
        f"{title}: {report.num_requests} requests in {report.seconds:.0f} s, slowest "
        f"{report.longest_s:g} s"
    )
    print(f"  outcomes: {dict(report.outcomes)}")
    print(f"  totals: {json.dumps(report.totals)}")
    for line in [*report.details, *report.left]:
        print(f"  {line}")
    sys.stdout.flush()
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
