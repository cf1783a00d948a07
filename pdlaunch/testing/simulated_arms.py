"""Compares ways to serve the same load on two engines, simulated on costs that engines have told.

::

    python -m pdlaunch.testing.simulated_arms 512/256@32 512/256@25rps

Each load is tokens in / tokens out @ requests at once, or requests a second. The arms are one
prefill and one decode engine with routes by cost and with pairs alone, and two engines of both
roles. The costs are those of the 8B shape on two H200s (docs/measurements/routing.md), or those of
a deployment (``--status``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.costs import MAX_SLOWDOWN, EngineCosts, StepCosts
from pdlaunch.router import waiting_policy
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine import Engine
from pdlaunch.router.policy import LeastWork, Policy, PrefixIndex, Route, RoutingRequest
from pdlaunch.testing.simulated_run import read_costs
from pdlaunch.testing.simulator import SimEngine, SimRequest, Simulation

H200 = EngineCosts(
    StepCosts(0.00465, 1.1e-5, 3.0e-8, 2.0e-5, 4.4e-10, 0.0155, 1024),
    max_num_seqs=128,
    max_num_batched_tokens=8192,
    block_size=16,
    num_kv_tokens=327_680,
    kv_bytes_per_token=131_072,
)
"""An 8B shape in bf16 on one H200, as its engine has told it."""
PULL_S = 0.012
"""Time between a prompt's end and the decode engine's first step with it; measured: 15 to 25 ms to
the second token.
"""
WAY_S = (0.004, 0.014)
SLOWNESS = (0.98, 1.08)
"""From and to: what requests take to the router, and steps as a share of what they should take.
Without these, requests that came together would end together, round after round.
"""
NUM_DRAWS = 3
"""Simulations of which each figure is the median: what meets whom changes it."""
NUM_ROUNDS = 4
OPEN_LOOP_S = 30.0


class Waiting:
    """Puts the policy that counts what waits in the place of one by cost."""

    def choose(
        self,
        request: RoutingRequest,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route:
        asked = waiting_policy.RoutingRequest(
            num_prompt_tokens=request.num_prompt_tokens, max_tokens=request.max_tokens
        )
        limits = waiting_policy.Limits()
        found = waiting_policy.choose(asked, engines, index, now_at, limits)
        if found.prefill is None:
            return Route(reason=found.reason, decode=found.decode)
        return Route(reason=found.reason, prefill=found.prefill, planned=found.decode)

    def take_over(self, *_: object) -> None:
        return None


class WaitingInWholeChunks(Waiting):
    """The same, at engines that compute as many tokens of prompts in a step as fit."""


ARMS: Mapping[str, tuple[tuple[str, ...], type[LeastCost] | type[LeastWork] | type[Waiting]]] = {
    "waits": (("prefill-0", "decode-0"), Waiting),
    "whole": (("prefill-0", "decode-0"), WaitingInWholeChunks),
    "cost": (("prefill-0", "decode-0"), LeastCost),
    "pairs": (("prefill-0", "decode-0"), LeastWork),
    "both": (("both-0", "both-1"), LeastWork),
}


class SimLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Says what comes: so many at once, or so many a second in random intervals."""

    num_prompt_tokens: int
    num_output_tokens: int
    concurrency: int | None
    per_second: float | None

    def requests(self, begin_at: float = 0.0) -> list[SimRequest]:
        """Return the requests of a run, the same each time."""
        return [
            SimRequest(number, begin_at + instant, self.num_prompt_tokens, self.num_output_tokens)
            for number, instant in enumerate(self._instants())
        ]

    def _instants(self) -> Iterator[float]:
        if self.per_second is None:
            yield from itertools.repeat(0.0, NUM_ROUNDS * (self.concurrency or 1))
            return
        draw, rate = random.Random(1), self.per_second
        gaps_s = (draw.expovariate(rate) for _ in range(int(rate * OPEN_LOOP_S)))
        yield from itertools.accumulate(gaps_s)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what clients would see; times in ms."""

    ttft: tuple[float, float]
    """Median and 99th percentile."""
    itl: tuple[float, float, float]
    """The same, and the longest."""
    tokens_per_s: float

    @property
    def line(self) -> str:
        return "TTFT {:6.0f} {:6.0f}   ITL {:5.1f} {:6.1f} {:6.0f}   {:7.0f} tokens/s".format(
            *self.ttft, *self.itl, self.tokens_per_s
        )


def read_load(text: str) -> SimLoad:
    """Read ``512/256@32`` or ``512/256@25rps``. Raises ValueError."""
    tokens, _, rate = text.partition("@")
    prompt, _, output = tokens.partition("/")
    is_open = rate.endswith("rps")
    return SimLoad(
        num_prompt_tokens=int(prompt),
        num_output_tokens=int(output),
        concurrency=None if is_open else int(rate),
        per_second=float(rate.removesuffix("rps")) if is_open else None,
    )


def simulate(
    load: SimLoad, names: Sequence[str], policy: Policy, costs: EngineCosts, seed: int
) -> Figures:
    """Run a load twice through new engines of these names (``role-number``); return the figures of
    the second time. ``seed``: of what is drawn at random.
    """
    engines = []
    for name in names:
        role: Role = name.partition("-")[0]  # type: ignore[assignment]
        bound = None if role == "both" or isinstance(policy, WaitingInWholeChunks) else MAX_SLOWDOWN
        engines.append(SimEngine(name, role, msgspec.structs.replace(costs, max_slowdown=bound)))
    draw = random.Random(seed)
    simulation = Simulation(
        engines,
        policy,
        pull_s=lambda _: PULL_S,
        way_s=lambda: draw.uniform(*WAY_S),
        slowness=lambda: draw.uniform(*SLOWNESS),
    )
    # The first run is for the policy, which learns what comes.
    simulation.run(load.requests(), load.concurrency)
    begin_at = simulation.now_at
    requests = load.requests(begin_at)
    simulation.run(requests, load.concurrency)
    ttft = sorted(request.ttft_s * 1000 for request in requests)
    gaps = sorted(gap_s * 1000 for request in requests for gap_s in request.gaps_s)
    num_tokens = sum(len(request.tokens_at) for request in requests)
    return Figures(
        ttft=(statistics.median(ttft), _p99(ttft)),
        itl=(statistics.median(gaps), _p99(gaps), gaps[-1]),
        tokens_per_s=num_tokens / (simulation.now_at - begin_at),
    )


def medians(load: SimLoad, arm: str, costs: EngineCosts) -> Figures:
    """Return the medians of some simulations of an arm, which differ in what is drawn at random."""
    names, policy = ARMS[arm]
    found = [simulate(load, names, policy(), costs, seed) for seed in range(1, NUM_DRAWS + 1)]
    p50, p99 = zip(*(one.ttft for one in found), strict=True)
    gap_p50, gap_p99, longest = zip(*(one.itl for one in found), strict=True)
    middle = statistics.median
    return Figures(
        ttft=(middle(p50), middle(p99)),
        itl=(middle(gap_p50), middle(gap_p99), middle(longest)),
        tokens_per_s=middle(one.tokens_per_s for one in found),
    )


def _p99(ordered: Sequence[float]) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def _costs_of(status: Mapping[str, Any]) -> EngineCosts:
    return read_costs(next(one["costs"] for one in status["engines"] if one.get("costs")))


def main() -> None:
    """Print a line for each load and arm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loads", nargs="+", type=read_load, metavar="IN/OUT@LOAD")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--status", type=Path, help="what /pdlaunch/status has answered")
    arguments = parser.parse_args()
    costs = (
        H200 if arguments.status is None else _costs_of(json.loads(arguments.status.read_text()))
    )
    for load in arguments.loads:
        rate = (
            f"{load.concurrency} at once" if load.per_second is None else f"{load.per_second:g}/s"
        )
        for arm in arguments.arms.split(","):
            figures = medians(load, arm, costs)
            sys.stdout.write(
                f"{load.num_prompt_tokens}/{load.num_output_tokens}, {rate:<12} {arm:<6} "
                f"{figures.line}\n"
            )


if __name__ == "__main__":
    main()
