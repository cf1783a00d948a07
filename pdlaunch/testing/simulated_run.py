"""Simulates what was measured, and says by how much that is off.

``python -m pdlaunch.testing.simulated_run`` reads the status of the deployment
(``/pdlaunch/status``, which has the costs of its engines) and what ``bench serve --format json``
has found. It runs each row's load in the simulator and prints measured and simulated figures side
by side. What the simulator does not know, as the way over HTTP and other programs on the machine,
is part of its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pdlaunch.protocol.costs import EngineCosts, StepCosts
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import LeastWork, Policy
from pdlaunch.testing.simulator import SimEngine, SimRequest, Simulation


class MeasuredRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is used of a row of ``bench serve``."""

    input_tokens: int
    concurrency: int
    num_requests: int
    total_output_tokens: int
    ttft_ms_median: float
    ttft_ms_p99: float
    itl_ms_median: float
    output_tokens_per_s: float
    pull_ms_mean: float | None = None

    @property
    def output_tokens(self) -> int:
        return self.total_output_tokens // self.num_requests


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one figure of one row."""

    row: str
    figure: str
    measured: float
    simulated: float

    @property
    def relative_error(self) -> float:
        return abs(self.simulated - self.measured) / self.measured


def read_costs(values: Mapping[str, Any]) -> EngineCosts:
    """Return the costs of an engine in a status."""
    # A status that was saved earlier lacks what was not measured then.
    steps = StepCosts(
        **{name: values[name] for name in StepCosts.__struct_fields__ if name in values}
    )
    limits = {name: values[name] for name in EngineCosts.__struct_fields__ if name != "steps"}
    return EngineCosts(steps, **limits)


def idle_engines(status: Mapping[str, Any]) -> list[SimEngine]:
    """Return the engines of a status, idle. Raises LookupError when one tells no costs."""
    engines = []
    for engine in status["engines"]:
        if engine.get("costs") is None:
            raise LookupError(f"engine {engine['name']} tells no costs")
        engines.append(SimEngine(engine["name"], engine["role"], read_costs(engine["costs"])))
    return engines


def simulate_row(engines: Sequence[SimEngine], row: MeasuredRow, policy: Policy) -> list[Compared]:
    """Run a row's load in the simulator and compare the figures."""
    requests = [
        SimRequest(number, 0.0, row.input_tokens, row.output_tokens)
        for number in range(row.num_requests)
    ]
    pull_s = (row.pull_ms_mean or 0.0) / 1000
    Simulation(engines, policy, pull_s=lambda _: pull_s).run(requests, row.concurrency)
    ttft_ms = sorted(request.ttft_s * 1000 for request in requests)
    gaps_ms = [gap_s * 1000 for request in requests for gap_s in request.gaps_s[1:]]
    end_at = max(request.tokens_at[-1] for request in requests)
    num_tokens = sum(len(request.tokens_at) for request in requests)
    figures = {
        "ttft_ms_median": (row.ttft_ms_median, statistics.median(ttft_ms)),
        "ttft_ms_p99": (row.ttft_ms_p99, ttft_ms[min(len(ttft_ms) - 1, len(ttft_ms) * 99 // 100)]),
        "itl_ms_median": (row.itl_ms_median, statistics.median(gaps_ms)),
        "output_tokens_per_s": (row.output_tokens_per_s, num_tokens / end_at),
    }
    name = f"{row.input_tokens}/{row.output_tokens}, {row.concurrency} at once"
    return [
        Compared(row=name, figure=figure, measured=measured, simulated=simulated)
        for figure, (measured, simulated) in figures.items()
    ]


def compare(
    status: Mapping[str, Any], rows: Sequence[MeasuredRow], policy: Policy
) -> list[Compared]:
    """Compare all rows, each with idle engines."""
    return [one for row in rows for one in simulate_row(idle_engines(status), row, policy)]


def main() -> None:
    """Print a line for each figure, and the mean error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("status", type=Path, help="what /pdlaunch/status has answered after a run")
    parser.add_argument("report", type=Path, help="what bench serve --format json has printed")
    parser.add_argument("--pairs-only", action="store_true", help="simulate least work instead")
    arguments = parser.parse_args()
    found = json.loads(arguments.report.read_text())
    rows = msgspec.convert(found["rows"] if isinstance(found, dict) else found, list[MeasuredRow])
    policy: Policy = LeastWork() if arguments.pairs_only else LeastCost()
    compared = compare(json.loads(arguments.status.read_text()), rows, policy)
    lines = [
        f"{one.row:<28} {one.figure:<20} measured {one.measured:>9.1f}  "
        f"simulated {one.simulated:>9.1f}  error {one.relative_error:>4.0%}"
        for one in compared
    ]
    lines.append(f"mean error {statistics.fmean(one.relative_error for one in compared):.0%}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
