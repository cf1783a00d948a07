"""Finds the role that limits a deployment, from its status.

Load is counted in engines: 1.5 is the work of one and a half engines::

    prompts   share of the time in which engines compute prompts, plus the queue
    tokens    largest of: use of the batch, use of the KV cache, 1 - fastest ITL / present ITL

If a token takes ``a + b * streams`` seconds, an engine makes at most ``1 / b`` tokens a second. The
ratio of ITLs gives the used share of that rate. The share is at most ``1 - 1 / streams``, so that
few streams never count as a high load, even on a slow machine.

Prefill engines compute the prompts, decode engines the tokens. With the routing policy ``load``,
decode engines also compute the prompts that prefill has no time for. Prompts then limit only when
the decode engines are busy too.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pdlaunch.config.roles import PAIR, ROLES
from pdlaunch.config.shared_settings import ONE_ENGINE_POLICIES
from pdlaunch.protocol.status import (
    Bottleneck,
    BottleneckKind,
    DeploymentStatus,
    EngineReading,
    EngineStatus,
)

# Loads at which prompts or tokens limit. At the first, a prompt waits three times as long as its
# prefill takes; at the second, a token takes three times as long as that of a lone stream.
HIGH_PROMPTS = 0.85
HIGH_TOKENS = 0.7
# A change of a role must lower the load to this share. Smaller gains would soon be undone.
GAIN = 0.6
QUEUE_S = 10.0  # a queue of this many seconds adds the load of one engine
FRESH_S = 10.0  # older readings of engines are ignored
SLOW_PULL_S = 0.05  # faster pulls never count as the limit
# Conditions of the autopilot: how long all looks must ask for the same change and all engines must
# have kept their states (20 s: `benchmarks.autopilot random --seed 261` loses 10 %), and the
# longest gap between two looks.
HOLD_S = 30.0
MAX_GAP_S = 6.0
_WORDS: dict[BottleneckKind, str] = {
    "prefill": "prefill queue",
    "decode": "decode batch",
    "kv_memory": "KV memory",
}


class _Tokens(NamedTuple):
    """Bounds of the load of each decode engine by tokens."""

    least: float
    most: float
    kind: BottleneckKind
    why: str


class _Load(NamedTuple):
    """The load of a deployment. Engines of role ``both`` are in ``prefill`` and in ``decode``."""

    prefill: Sequence[EngineStatus]
    decode: Sequence[EngineStatus]
    num_prompts: float  # counted in engines
    tokens: _Tokens
    at_decode: float  # share of the time in which a decode engine computes prompts
    spills: bool  # decode engines compute the prompts that prefill has no time for

    def uses(self, num_prefill: int, num_decode: int, of_tokens: float) -> tuple[float, float]:
        """Return the loads by prompts and tokens with these numbers of engines; 1 is the limit."""
        tokens = of_tokens * len(self.decode) / num_decode / HIGH_TOKENS
        if self.spills:
            return max(0.0, self.num_prompts - num_prefill) / num_decode / HIGH_TOKENS, tokens
        return self.num_prompts / num_prefill / HIGH_PROMPTS, tokens

    def use(self, num_prefill: int, num_decode: int, of_tokens: float) -> float:
        uses = self.uses(num_prefill, num_decode, of_tokens)
        return sum(uses) if self.spills else max(uses)


def bottleneck_line(found: Bottleneck) -> str:
    """Return the bottleneck as one line of text."""
    advice = f"; {found.advice}" if found.advice else ""
    return f"limited by: {_WORDS.get(found.kind, found.kind)} ({found.why}{advice})"


def find_bottleneck(status: DeploymentStatus) -> Bottleneck:
    """Return what limits a deployment, and the change of a role that would help, if any."""
    ready = {
        role: [each for each in status.engines if each.role == role and each.state == "ready"]
        for role in ROLES
    }
    prefill, decode = (ready[role] or ready["both"] for role in PAIR)
    if not prefill or not decode:
        return Bottleneck(kind="unknown", why="no pair of engines is ready")
    if silent := [each.name for each in (*prefill, *decode) if _fresh(each) is None]:
        why = f"no metrics of {', '.join(dict.fromkeys(silent))} in the last {FRESH_S:g} s"
        return Bottleneck(kind="unknown", why=why)
    load, wait_s = _load_of(prefill, decode, status)
    num = len(prefill), len(decode)
    of_prompts, of_tokens = load.num_prompts / num[0], load.tokens.least
    if load.use(*num, of_tokens) < 1.0:
        kind: BottleneckKind = "nothing"
        why, advice = _loads(of_prompts, of_tokens), ""
        if load.at_decode >= 0.01:
            why += f", streams wait {load.at_decode:.0%} of the time for prompts at decode engines"
        if slow := _slow_pulls(status):
            kind, why = "transfer", slow
            advice = "more engines would not help; `pdlaunch doctor` measures the paths"
        return Bottleneck(kind=kind, why=why, advice=advice, prompts=of_prompts, tokens=of_tokens)
    by_prompts, by_tokens = load.uses(*num, of_tokens)
    is_prefill = by_prompts > by_tokens
    advice, engine = _advice(load, status, is_prefill=is_prefill)
    return Bottleneck(
        kind="prefill" if is_prefill else load.tokens.kind,
        why=f"prompts wait {wait_s:.1f} s, prefill load {of_prompts:.0%}"
        if is_prefill
        else load.tokens.why,
        advice=advice,
        prompts=of_prompts,
        tokens=of_tokens,
        engine=engine,
        role=PAIR[not is_prefill] if engine else None,
    )


def _loads(of_prompts: float, of_tokens: float) -> str:
    return f"prefill load {of_prompts:.0%}, decode load {of_tokens:.0%}"


def _fresh(engine: EngineStatus) -> EngineReading | None:
    reading = engine.reading
    return reading if reading is not None and reading.age_s <= FRESH_S else None


def _load_of(
    prefill: Sequence[EngineStatus], decode: Sequence[EngineStatus], status: DeploymentStatus
) -> tuple[_Load, float]:
    """Return the load, and the time until the prompts of the queue are computed."""
    speed = sum(each.prompt_tokens_per_s for each in prefill)
    num_tokens = sum(each.waiting_prompt_tokens for each in prefill) + status.queued_prompt_tokens
    wait_s = num_tokens / speed if speed else 0.0
    num_prompts = sum(each.computing for each in prefill) + len(prefill) * wait_s / QUEUE_S
    is_pair = prefill is not decode
    at_decode = sum(each.computing for each in decode) / len(decode) if is_pair else 0.0
    return _Load(
        prefill,
        decode,
        num_prompts + at_decode * len(decode),
        _tokens_of(decode, status, at_decode),
        at_decode,
        spills=is_pair and status.routing in ONE_ENGINE_POLICIES,
    ), wait_s


def _tokens_of(engines: Sequence[EngineStatus], status: DeploymentStatus, busy: float) -> _Tokens:
    num, now, fastest = len(engines), status.rates, status.fastest
    found = [reading for each in engines if (reading := _fresh(each)) is not None]
    num_running, num_waiting = sum(r.running for r in found), sum(r.waiting for r in found)
    kv = sum(reading.kv_usage for reading in found) / num
    most_running = sum(each.max_running for each in engines)
    batch = num_running / most_running if all(each.max_running for each in engines) else 0.0
    token_ms = (now.mean_inter_token_ms or 0.0) * max(0.0, 1.0 - busy)
    at_most = 1.0 - min(1.0, num / now.streams) if now.streams else 0.0
    slow, why_slow = 0.0, f"{now.streams:.0f} streams"
    # The fastest time is that of a lone stream only if few streams ran then.
    is_lone = fastest is not None and fastest.streams <= max(2.0 * num, now.streams / 4)
    if is_lone and fastest is not None and fastest.mean_inter_token_ms:
        alone_ms = fastest.mean_inter_token_ms
        at_most = slow = min(at_most, 1.0 - min(1.0, alone_ms / max(token_ms, 1e-9)))
        why_slow = f"a token takes {token_ms:.1f} ms, {alone_ms:.1f} ms with few streams"
    if max(batch, kv) >= HIGH_TOKENS and num_running:
        # If the batch or the cache is full, most requests wait for a place, few for a pull.
        batch, kv = (share and share + num_waiting / num_running for share in (batch, kv))
    shares: list[tuple[float, BottleneckKind, str]] = [
        (slow, "decode", why_slow),
        (batch, "decode", f"{num_running} of at most {most_running} requests run"),
        (kv, "kv_memory", f"the decode KV caches are {min(kv, 1.0):.0%} full"),
    ]
    share, kind, why = max(shares, key=lambda each: each[0])
    return _Tokens(share, max(share, at_most), kind, f"{why}, {num_waiting} wait")


def _slow_pulls(status: DeploymentStatus) -> str:
    readings = [reading for each in status.engines if (reading := _fresh(each)) is not None]
    mean_s = max((reading.pulls.mean_s or 0.0 for reading in readings), default=0.0)
    first = status.rates.first_token_ms
    if first is None or mean_s < max(SLOW_PULL_S, first.p50 / 1e3):
        return ""
    return f"a pull takes {mean_s * 1e3:.0f} ms, the first token {first.p50:.0f} ms"


def _advice(load: _Load, status: DeploymentStatus, *, is_prefill: bool) -> tuple[str, str]:
    """Return advice, and the engine that should change its role; empty if no engine should."""
    takers, givers = (load.prefill, load.decode)[:: 1 if is_prefill else -1]
    role, other = takers[0].role, givers[0].role
    more = f"`pdlaunch scale {role}={len(takers) + 1}` would help"
    if takers is givers:
        return more, ""
    if len(givers) < 2:
        return f"{more}; the only {other} engine must stay", ""
    if unready := [each.name for each in status.engines if each.shown_state != "ready"]:
        return f"{more}; no engine can change its role while {unready[0]} is not ready", ""
    if len({each.num_devices for each in status.engines}) > 1:
        return f"{more}; no engine can change its role, since they differ in size", ""
    num = len(load.prefill), len(load.decode)
    then = (num[0] + 1, num[1] - 1) if is_prefill else (num[0] - 1, num[1] + 1)
    prompts, tokens = load.num_prompts / then[0], load.tokens.most * num[1] / then[1]
    gain = load.use(*then, load.tokens.most) / load.use(*num, load.tokens.least)
    # The engines that remain must not become the limit, nor leave more prompts to decode engines.
    if gain > GAIN or (tokens >= HIGH_TOKENS if is_prefill else prompts >= HIGH_PROMPTS):
        return f"{more}; with one {other} engine less: {_loads(prompts, tokens)}", ""
    giver = min(givers, key=lambda each: (each.load, each.name))
    return f"after `pdlaunch role {giver.name} {role}`: {_loads(prompts, tokens)}", giver.name


class Look(NamedTuple):
    """The bottleneck and the states of the engines at one instant."""

    at: float
    found: Bottleneck
    engines: Sequence[tuple[str, str]]


def decide(looks: Sequence[Look], now_at: float) -> Bottleneck | None:
    """Return the latest bottleneck if the change of a role that it advises is due.

    In the last ``HOLD_S`` all looks must have asked for one more engine of the same role, no engine
    may have come, gone or changed its state, and no look may be missing.
    """
    recent = [look for look in looks if look.at >= now_at - HOLD_S]
    times = [now_at - HOLD_S, *(look.at for look in recent), now_at]
    if any(after - before > MAX_GAP_S for before, after in pairwise(times)):
        return None
    last = recent[-1]
    wanted = {look.found.role for look in recent}
    is_calm = all(look.engines == last.engines for look in recent)
    return last.found if is_calm and wanted == {last.found.role} != {None} else None
