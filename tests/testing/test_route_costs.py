"""What routes cost is measured in launches as large ones are."""

from __future__ import annotations

from collections import Counter

import pytest

from pdlaunch.protocol.due_pairs import MAX_PEERS
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.testing.route_costs import busy_pool, make_registry, table


@pytest.mark.parametrize("num_engines", [100, 400])
def test_pairs_grow_with_the_engines_and_not_with_their_square(num_engines: int) -> None:
    pairs = make_registry(num_engines).pairs
    # Each engine chooses so many of the other role.
    assert len(pairs) <= num_engines * MAX_PEERS
    peers = Counter(name for pair in pairs for name in (pair.local, pair.peer))
    assert len(peers) == num_engines
    assert min(peers.values()) >= MAX_PEERS


def test_what_is_measured_are_routes_by_cost() -> None:
    pool = busy_pool(LeastCost(), 20)
    route = pool.route(RoutingRequest(hop="prefill", num_prompt_tokens=1000, max_tokens=200))
    assert route.estimate is not None
    assert {estimate.kind for estimate in route.alternatives} >= {"prefill", "decode"} - {
        route.kind
    }
    rows = table([4, 8]).splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| engines", "|---|---|---|---|", "| 4", "| 8"]
