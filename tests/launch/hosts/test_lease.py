"""No engine runs twice: an agent that is cut off has ended before its engines start elsewhere."""

import math
import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.launch.hosts.agent_channel import AgentLease, beat_s, ended_by

NUM_BEATS = 120


@dataclass
class Ends:
    agent: float
    """When the agent has ended its processes."""
    supervisor: float
    """From when on the supervisor may start them elsewhere."""


def run(timeout_s: float, up: list[float], down: list[float], offset: float) -> Ends:
    """One session on a virtual clock, that of the supervisor; that of the agent is ``offset`` more.

    Both say Beat at the same times; ``up`` and ``down`` are the seconds that each Beat of the agent
    and of the supervisor takes, an infinite one is never there. Messages stay in order.
    """
    every_s = beat_s(timeout_s)
    lease = AgentLease(offset, timeout_s)
    seen_at, stamp = 0.0, 0.0
    to_supervisor: list[tuple[float, float]] = []
    to_agent: list[tuple[float, float]] = []
    ends = Ends(math.inf, math.inf)
    turn = 0
    while math.inf in (ends.agent, ends.supervisor):
        now = turn * every_s
        while to_agent and to_agent[0][0] <= now:
            lease.renew(to_agent.pop(0)[1])
        if ends.agent == math.inf and lease.silent_s(now + offset) is not None:
            ends.agent = now
        while to_supervisor and to_supervisor[0][0] <= now:
            arrived_at, stamp = to_supervisor.pop(0)
            seen_at = max(seen_at, arrived_at)
        if ends.supervisor == math.inf and now > ended_by(seen_at, timeout_s):
            ends.supervisor = now
        # After the last delay that the test names nothing arrives, so both come to an end.
        if turn < NUM_BEATS:
            if ends.agent == math.inf:
                send(to_supervisor, now, up[turn], now + offset)
            if ends.supervisor == math.inf:
                send(to_agent, now, down[turn], stamp)
        turn += 1
    return ends


def send(link: list[tuple[float, float]], now: float, delay_s: float, stamp: float) -> None:
    """Put a message behind those that are under way."""
    link.append((max(now + delay_s, link[-1][0] if link else 0.0), stamp))


def delays(draw: random.Random) -> list[float]:
    """Some of a link that is bad at times, and cut at last."""
    longest_s = draw.choice((0.1, 2.0, 30.0))
    cut = draw.randrange(NUM_BEATS)
    return [draw.uniform(0.0, longest_s) if turn < cut else math.inf for turn in range(NUM_BEATS)]


@given(st.integers(0, 1 << 32))
def test_whatever_the_network_does(seed: int) -> None:
    draw = random.Random(seed)
    ends = run(draw.uniform(0.4, 60.0), delays(draw), delays(draw), draw.uniform(0.0, 1e6))
    assert ends.agent <= ends.supervisor


def test_a_link_that_works_keeps_the_lease() -> None:
    ends = run(20.0, [0.5] * NUM_BEATS, [0.5] * NUM_BEATS, 5.0)
    assert ends.agent > NUM_BEATS * beat_s(20.0)
