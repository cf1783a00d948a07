"""Says which engines get requests now, and why others are left out.

An engine is left out while it fails requests (``breaker.py``), and while it is slow (``pace.py``).
Both are sent a request now and then: they **want a try**. All functions are pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import msgspec

from pdlaunch.router.engine import Engine
from pdlaunch.router.pace import SLOW_AT, slowness

HealthState = Literal["closed", "open", "half_open", "slow"]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Judges the engines that are ready, by name."""

    usable: dict[str, Engine]
    """Those that a request may be sent to; of others some may have to serve all the same."""
    wants_try: frozenset[str]
    """Those of the usable that were left out until now: one request is to show whether they have
    recovered.
    """
    left_out: dict[str, str]
    """The reason why an engine gets nothing new."""
    slowness: dict[str, float]
    """The time that each takes, in multiples of that of the usual one of its role."""


def survey(engines: Sequence[Engine], now_at: float) -> Health:
    """Judge all engines that are ready."""
    usable: dict[str, Engine] = {}
    left_out: dict[str, str] = {}
    wants_try: set[str] = set()
    by_role: dict[str | None, list[Engine]] = defaultdict(list)
    for engine in engines:
        if not engine.ready:
            continue
        if engine.breaker.takes(now_at):
            usable[engine.name] = engine
        else:
            left_out[engine.name] = engine.breaker.why(now_at)
        if engine.breaker.is_tripped:
            wants_try |= {engine.name} & usable.keys()
        else:
            by_role[engine.role].append(engine)
    times_slower: dict[str, float] = {}
    for peers in by_role.values():
        for engine, times in zip(peers, slowness([one.pace for one in peers]), strict=True):
            times_slower[engine.name] = times
            if times <= SLOW_AT:
                continue
            if now_at >= engine.pace.next_try_at:
                wants_try.add(engine.name)
            else:
                del usable[engine.name]
                left_out[engine.name] = f"{times:.1f} times slower than its peers"
    return Health(
        usable=usable, wants_try=frozenset(wants_try), left_out=left_out, slowness=times_slower
    )


def state_of(engine: Engine, health: Health, now_at: float) -> HealthState:
    """Return the state of an engine's breaker; ``slow``: it works, but it gets tries alone."""
    state = engine.breaker.state(now_at)
    is_slow = health.slowness.get(engine.name, 1.0) > SLOW_AT
    return "slow" if state == "closed" and is_slow else state


def may_pull(decode: Engine, prefill: Engine, now_at: float) -> bool:
    """Tell whether ``decode`` may be handed KV blocks of ``prefill``, and pulls work."""
    breaker = decode.pulls.get(prefill.key)
    return decode.may_pull_from(prefill) and (breaker is None or breaker.takes(now_at))
