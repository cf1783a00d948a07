"""Finds the role that limits a deployment, from its status.

The use of a role is the share of what its engines can do that they do; above 1, work piles up::

    prefill   share of time in which engines compute prompts, and the queue
    decode    the largest of: batch, KV cache, and 1 - fastest / present time of a token

If a token takes ``a + b * streams`` seconds, an engine gives at most ``1 / b`` tokens a second, and
the last of these is the share of that. It is at most ``1 - 1 / streams``, so few streams are never
much, however slow the machine is. An engine that changes its role takes its share of the use along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pdlaunch.config.roles import PAIR, Role
from pdlaunch.protocol.status import (
    Bottleneck,
    BottleneckKind,
    DeploymentStatus,
    EngineReading,
    EngineStatus,
    Rates,
)

# A role limits from this use on. At 0.7 a prompt waits about as long as it is computed, and a token
# takes three times as long as that of a lone stream.
HIGH = 0.7
# A change of a role must lower the largest use to this share of itself, so that the load has to
# turn before another change takes it back.
GAIN = 0.75
# A queue that takes this long to compute counts as one engine's work.
QUEUE_S = 10.0
FRESH_S = 10.0  # older readings of engines tell nothing
# Faster pulls limit nobody.
SLOW_PULL_S = 0.05
_WORDS: dict[BottleneckKind, str] = {
    "prefill": "prefill queue",
    "decode": "decode batch",
    "kv_memory": "KV memory",
    "transfer": "transfer",
    "nothing": "nothing",
    "unknown": "not known",
}


class _Use(NamedTuple):
    """The use of a role, at least and at most, and what it comes from."""

    role: Role
    num_engines: int
    least: float
    most: float
    kind: BottleneckKind
    why: str

    def with_engines(self, more: int) -> float:
        """Return the use, at most, with so many engines more."""
        return self.most * self.num_engines / (self.num_engines + more)


def bottleneck_line(found: Bottleneck) -> str:
    """Return a line for people."""
    advice = f"; {found.advice}" if found.advice else ""
    return f"limited by: {_WORDS[found.kind]} ({found.why}{advice})"


def find_bottleneck(status: DeploymentStatus) -> Bottleneck:
    """Return what limits a deployment, and the change of a role that would help, if one would."""
    uses = [use for role in (*PAIR, "both") for use in _uses(role, status)]
    if not uses:
        return Bottleneck(kind="unknown", why="no engine is ready")
    numbers = {use.role: max(each.least for each in uses if each.role == use.role) for use in uses}
    worst = max(uses, key=lambda use: use.least)
    if silent := [each.name for each in status.engines if _is_ready(each) and not _fresh(each)]:
        why = f"{', '.join(silent)} did not say what it does for {FRESH_S:g} s"
        return Bottleneck(kind="unknown", why=why, use=numbers)
    if worst.least < HIGH:
        if why := _slow_pulls(status):
            return Bottleneck(
                kind="transfer",
                why=why,
                advice="no other number of engines helps: `pdlaunch doctor` measures the paths",
                use=numbers,
            )
        why = ", ".join(f"{role} is used {use:.0%}" for role, use in numbers.items())
        return Bottleneck(kind="nothing", why=why, use=numbers)
    advice, engine = _advice(worst, uses, status)
    return Bottleneck(
        kind=worst.kind,
        why=worst.why,
        advice=advice,
        use=numbers,
        engine=engine,
        role=worst.role if engine else None,
    )


def _is_ready(engine: EngineStatus) -> bool:
    return engine.state == "ready"


def _fresh(engine: EngineStatus) -> EngineReading | None:
    reading = engine.reading
    return reading if reading is not None and reading.age_s <= FRESH_S else None


def _uses(role: Role, status: DeploymentStatus) -> Sequence[_Use]:
    engines = [each for each in status.engines if each.role == role and _is_ready(each)]
    if not engines:
        return ()
    prompts = (_prompt_use(role, engines, status),) if role != "decode" else ()
    return (*prompts, _token_use(role, engines, status)) if role != "prefill" else prompts


def _prompt_use(role: Role, engines: Sequence[EngineStatus], status: DeploymentStatus) -> _Use:
    computing = sum(each.computing for each in engines) / len(engines)
    speed = sum(each.prompt_tokens_per_s for each in engines)
    num_tokens = sum(each.waiting_prompt_tokens for each in engines) + status.queued_prompt_tokens
    wait_s = num_tokens / speed if speed else 0.0
    use = computing + wait_s / QUEUE_S
    why = f"prompts wait {wait_s:.1f} s for {role}, which computes {computing:.0%} of the time"
    return _Use(role, len(engines), use, use, "prefill", why)


def _token_use(role: Role, engines: Sequence[EngineStatus], status: DeploymentStatus) -> _Use:
    num, now, fastest = len(engines), status.rates, status.fastest
    found = [reading for each in engines if (reading := _fresh(each)) is not None]
    num_running, num_waiting = sum(r.running for r in found), sum(r.waiting for r in found)
    kv = sum(reading.kv_usage for reading in found) / num
    most_running = sum(each.max_running for each in engines)
    batch = num_running / most_running if all(each.max_running for each in engines) else 0.0
    # While an engine computes a prompt, its streams wait.
    computing = sum(each.computing for each in engines) / num if role == "decode" else 0.0
    token_ms = (now.mean_inter_token_ms or 0.0) * max(0.0, 1.0 - computing)
    at_most = 1.0 - min(1.0, num / now.streams) if now.streams else 0.0
    slow, why_slow = 0.0, f"{now.streams:.0f} streams"
    if fastest is not None and fastest.mean_inter_token_ms and _is_lone(fastest, now, num):
        alone_ms = fastest.mean_inter_token_ms
        at_most = slow = min(at_most, 1.0 - min(1.0, alone_ms / max(token_ms, 1e-9)))
        why_slow = f"a token takes {token_ms:.1f} ms, {alone_ms:.1f} ms with few streams"
    if max(batch, kv) >= HIGH and num_running:
        # Those that wait for a pull are few then, beside those that wait for a place.
        batch, kv = (share and share + num_waiting / num_running for share in (batch, kv))
    shares: list[tuple[float, BottleneckKind, str]] = [
        (slow, "decode", why_slow),
        (batch, "decode", f"{num_running} of at most {most_running} requests run"),
        (kv, "kv_memory", f"the KV caches are {min(kv, 1.0):.0%} full"),
    ]
    share, kind, why = max(shares, key=lambda each: each[0])
    if num_waiting:
        why = f"{why}, {num_waiting} wait"
    return _Use(role, num, share, max(share, at_most), kind, f"{role}: {why}")


def _is_lone(fastest: Rates, now: Rates, num_engines: int) -> bool:
    """Return whether the fastest tokens came while so few streams ran that they say what a lone
    stream would have.
    """
    return fastest.streams <= max(2.0 * num_engines, now.streams / 4)


def _slow_pulls(status: DeploymentStatus) -> str:
    readings = [reading for each in status.engines if (reading := _fresh(each)) is not None]
    mean_s = max((reading.pulls.mean_s or 0.0 for reading in readings), default=0.0)
    first = status.rates.first_token_ms
    if first is None or mean_s < max(SLOW_PULL_S, first.p50 / 1e3):
        return ""
    return f"a pull takes {mean_s * 1e3:.0f} ms, the first token {first.p50:.0f} ms"


def _advice(worst: _Use, uses: Sequence[_Use], status: DeploymentStatus) -> tuple[str, str]:
    """Return what would help, and the engine that should change its role; empty: none."""
    role, num = worst.role, worst.num_engines
    more = f"`pdlaunch scale {role}={num + 1}` would bring {role} to {worst.with_engines(1):.0%}"
    others = [use for use in uses if role in PAIR and use.role in PAIR and use.role != role]
    if not others:
        return more, ""
    (other,) = others
    if other.num_engines < 2:
        return f"{more}; there is no second {other.role} engine to take", ""
    if unready := [each.name for each in status.engines if each.shown_state != "ready"]:
        return f"{more}; no engine can change its role while {unready[0]} is not ready", ""
    left = other.with_engines(-1)
    largest = max(left, worst.with_engines(1))
    if largest > GAIN * worst.least:
        reason = f"with one engine less {other.role} might be used {left:.0%}"
        return f"{more}; {reason}", ""
    givers = [each for each in status.engines if each.role == other.role]
    giver = min(givers, key=lambda each: (each.load, each.name))
    return (
        f"`pdlaunch role {giver.name} {role}` would bring {role} from {worst.least:.0%} to "
        f"{worst.with_engines(1):.0%}, and {other.role} from {other.most:.0%} to {left:.0%}"
    ), giver.name
