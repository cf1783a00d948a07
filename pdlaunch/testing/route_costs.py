"""Measures what routes cost a router with many engines, for ``control_plane``.

Pool, policies and index are the real ones; engines are entries of a registry that tell costs and
loads. Each has the peers that a launch would give it.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from pdlaunch.config.roles import PAIR, Role
from pdlaunch.protocol.control import Address, Capabilities, Entry, PairReady, Registry
from pdlaunch.protocol.costs import EngineCosts, EngineReport, StepCosts
from pdlaunch.protocol.due_pairs import due_pairs
from pdlaunch.protocol.ids import EngineId
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import LeastWork, Policy, RoutingRequest
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.prefix_index import Piece, PrefixHashes, ServedPrefixes

NUM_ROUTES = 50
NUM_PIECES = 32
"""Pieces of each prompt that the index is asked for."""
COSTS = EngineCosts(
    steps=StepCosts(step_s=0.005, stream_s=1e-5, context_s=1e-8, prompt_s=2e-5, attended_s=1e-10),
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    block_size=16,
    num_kv_tokens=1_000_000,
    kv_bytes_per_token=100_000,
    max_slowdown=2.0,
)


def make_registry(num_engines: int) -> Registry:
    """Return a registry in which half of the engines prefill, and all pairs are proven."""
    names: dict[Role, list[str]] = {
        role: [f"{role}-{index}" for index in range(num_engines // 2)] for role in PAIR
    }
    pairs = sorted(due_pairs(names["prefill"], names["decode"]))
    peers: defaultdict[str, list[str]] = defaultdict(list)
    for prefill, decode in pairs:
        peers[prefill].append(decode)
        peers[decode].append(prefill)
    can = Capabilities(
        verifies=True, resumes=True, gives_first_token=True, awaits_lease=True, costs=COSTS
    )
    entries = []
    for role, engines in names.items():
        for name in engines:
            rank = Address(side_channel="tcp://10.0.0.1:9", requests="tcp://10.0.0.1:9")
            common: dict[str, Any] = {"incarnation": 1, "engine": name, "role": role}
            common |= {"state": "ready"}
            entries += [
                Entry(
                    name=f"{name}/rank-0",
                    kind="rank",
                    engine_id=EngineId(name),
                    address=rank,
                    **common,
                ),
                Entry(
                    name=name,
                    kind="server",
                    address=Address(http="https://10.0.0.1:9"),
                    capabilities=can,
                    peers=tuple(peers[name]),
                    **common,
                ),
            ]
    ready = [
        PairReady(
            local=f"{decode}/rank-0",
            peer=f"{prefill}/rank-0",
            peer_incarnation=1,
            seconds=0.01,
            path="simulated",
            gigabytes_per_s=10.0,
        )
        for prefill, decode in pairs
    ]
    return Registry(version=1, entries=entries, pairs=ready)


def busy_pool(policy: Policy, num_engines: int) -> EnginePool:
    """Return a pool whose engines work, and whose index knows prompts of each."""
    drawn = random.Random(num_engines)
    index = ServedPrefixes()
    pool = EnginePool(time.monotonic, policy, index)
    pool.update(make_registry(num_engines))
    for engine in pool.engines:
        num_streams = drawn.randrange(1, 64)
        engine.num_streams, engine.context_tokens = num_streams, num_streams * 2000
        waiting = drawn.randrange(4000) if engine.role == "prefill" else 0
        report = EngineReport(waiting, num_streams, num_streams * 2000, 500_000, COSTS, 100.0)
        engine.hear(report, time.monotonic())
        index.served(engine, made_up_prefix(drawn), 1000, 100)
    return pool


def made_up_prefix(drawn: random.Random) -> PrefixHashes:
    """Return the pieces of a prompt that nobody else has."""
    shares = [number / NUM_PIECES for number in range(1, NUM_PIECES + 1)]
    return tuple(Piece(drawn.getrandbits(64), share) for share in shares)


def cpu_ms(act: Callable[[], object], number: int) -> float:
    """Return the processor time of one of so many calls."""
    began = time.process_time()
    for _ in range(number):
        act()
    return 1000 * (time.process_time() - began) / number


def measure(num_engines: int) -> dict[str, float]:
    """Return milliseconds of the router's processor time by what it does."""
    numbers = count()

    def request() -> RoutingRequest:
        prefix = made_up_prefix(random.Random(next(numbers)))
        return RoutingRequest(hop="prefill", num_prompt_tokens=1000, max_tokens=200, prefix=prefix)

    by_cost, by_work = (busy_pool(policy, num_engines) for policy in (LeastCost(), LeastWork()))
    route = by_cost.route(request())
    assert route.estimate is not None, route.reason
    registry = make_registry(num_engines)
    return {
        "a route by cost": cpu_ms(lambda: by_cost.route(request()), NUM_ROUTES),
        "a route by least work": cpu_ms(lambda: by_work.route(request()), NUM_ROUTES),
        "a new registry": cpu_ms(lambda: by_cost.update(registry), 5),
    }


def table(numbers: Sequence[int]) -> str:
    """Return a table of Markdown, a row for each number of engines."""
    rows = {number: measure(number) for number in numbers}
    heads = ["engines", *(f"{name}: CPU ms" for name in rows[numbers[0]])]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for number, found in rows.items():
        lines.append(f"| {number} | {' | '.join(f'{ms:.2f}' for ms in found.values())} |")
    return "\n".join(lines)
