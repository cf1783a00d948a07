"""Kills processes of a deployment under load and waits for their successors.

``pdlaunch smoke --chaos SEED`` kills a rank while transfers fail, bytes change and leases end
early, and checks that the promises hold. ``make soak`` kills ranks in the same way; ``make kills``
prints a row for each kill.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.smoke import Check, engines_of
from pdlaunch.testing.soak import SoakOptions, SoakReport, make_cases, run_load, soak_session

NUM_REQUESTS = 60
RATE = 0.2
"""Share of the READs that meet a fault."""
MAX_TOLD = 20
"""Requests that went wrong, of which a report says when."""


def chaos_environment(seed: int, connector: str) -> dict[str, str]:
    """Return the settings of the connector faulty around ``connector``, as variables."""
    faults = {"INNER": connector, "SEED": str(seed), "RATE": str(RATE)}
    return {f"PDLAUNCH_KV_TRANSFER__FAULTY__{name}": value for name, value in faults.items()}


def smoke_under_chaos(
    deployment: Deployment, seed: int, *, api_key: str | None, exact: bool
) -> list[Check]:
    """Send load with known answers, and kill a rank.

    ``exact``: the deployment computes in float32; in other dtypes greedy answers may differ.
    """
    start_at = time.monotonic()
    options = SoakOptions(
        url=deployment.url,
        api_key=api_key,
        seed=seed,
        num_requests=NUM_REQUESTS,
        concurrency=4,
        num_cases=16,
        max_token_id=200,
    )
    report = asyncio.run(_load_and_kill(deployment, options))
    seconds = round(time.monotonic() - start_at, 3)
    faults = sum(
        report.totals[name]
        for name in ("transfer_failures", "leases_expired", "router_engine_failures")
    )
    return [
        Check(
            (
                f"{report.num_requests} requests under faults end with "
                f"{'the tokens of one engine alone' if exact else 'an answer'}"
            ),
            seconds,
            wrong_answers(report, exact=exact),
        ),
        # Both looked at the same run, whose time the first check has.
        Check("no block and no request is left", 0.0, "; ".join(report.left) or None),
        Check("faults were injected", 0.0, None if faults else "no transfer failed"),
    ]


def wrong_answers(report: SoakReport, *, exact: bool) -> str | None:
    """Say how many requests went wrong, and when, but not what was asked and answered: reports are
    passed on. None: all went well.
    """
    kinds = (*(("wrong",) if exact else ()), "broken", "stuck", "error")
    counts = [f"{report.outcomes[kind]} {kind}" for kind in kinds if report.outcomes[kind]]
    failed = [
        f"{sent.outcome} after {sent.end_at - sent.start_at:.1f} s"
        for sent in report.sent
        if sent.outcome in kinds
    ]
    return "; ".join([*counts, *failed[:MAX_TOLD]]) if counts else None


async def _load_and_kill(deployment: Deployment, options: SoakOptions) -> SoakReport:
    async with soak_session(options) as session:
        cases = await make_cases(options)
        load = asyncio.create_task(run_load(session, options, cases))
        await asyncio.sleep(random.Random(options.seed).uniform(0.5, 2))
        ranks = [name for name in deployment.processes() if name.endswith("/rank-0")]
        decode_first = max(ranks, key=lambda name: name.startswith("decode"))
        await kill_and_wait(deployment, decode_first, signal.SIGKILL)
        return await load


@dataclass
class Kill:
    """Records one ``kill -9``, or ``SIGSTOP``, and what clients saw of it."""

    process: str
    killed_at: float
    """Instant of the monotonic clock."""
    ready_s: float
    """Time from the kill until the router could use the engine again."""
    num_in_flight: int = 0
    num_lost: int = 0
    """Requests in flight that ended with an error, even one that says why."""
    longest_gap_s: float = 0.0
    """Longest time between two tokens that a client of a request in flight saw."""


async def load_with_kills(
    deployment: Deployment,
    options: SoakOptions,
    processes: list[str],
    source: random.Random,
    *,
    pause_s: tuple[float, float],
    signal_number: int = signal.SIGKILL,
) -> tuple[SoakReport, list[Kill]]:
    """Kill each of ``processes`` in turn under load, after a pause from the range ``pause_s``.

    Processes whose names are joined by ``+`` are killed at once. The load ends when the last one is
    back, or with its last request.
    """
    stop = asyncio.Event()
    kills: list[Kill] = []
    counted_before: Counter[str] = Counter()

    async def kill_all() -> None:
        for name in processes:
            await asyncio.sleep(source.uniform(*pause_s))
            for rank in [each for each in name.split("+") if "/rank-" in each]:
                counted_before.update(
                    await asyncio.to_thread(_counters_of, deployment, rank.partition("/")[0])
                )
            kills.append(await kill_and_wait(deployment, name, signal_number))
        await asyncio.sleep(pause_s[0])

    async with soak_session(options) as session:
        cases = await make_cases(options)
        killer = asyncio.create_task(kill_all())
        killer.add_done_callback(lambda _: stop.set())  # a kill that went wrong ends the load, too
        report = await run_load(session, options, cases, stop=stop)
        await _cancel(killer)
    report.totals = {
        name: round(value + counted_before[name], 3) for name, value in report.totals.items()
    }
    for kill in kills:
        hit = [sent for sent in report.sent if sent.start_at <= kill.killed_at <= sent.end_at]
        kill.num_in_flight = len(hit)
        kill.num_lost = sum(sent.outcome not in ("equal", "cancelled") for sent in hit)
        kill.longest_gap_s = max((sent.longest_gap_s for sent in hit), default=0.0)
    return report, kills


def _counters_of(deployment: Deployment, engine: str) -> dict[str, float]:
    """Return what the rank of an engine has counted: its counters die with it."""
    stats = json.loads(admin_api(deployment.url).engine(engine).get("/pdlaunch/integrity")[1])[
        "stats"
    ]
    return {
        name: value
        for name, value in stats.items()
        if isinstance(value, int | float) and not name.startswith("num_")
    }


async def _cancel(killer: asyncio.Task[None]) -> None:
    """Cancel the task; raise what has gone wrong in it."""
    killer.cancel()
    with suppress(asyncio.CancelledError):
        await killer


async def kill_and_wait(
    deployment: Deployment, name: str, signal_number: int, timeout_s: float = 300.0
) -> Kill:
    """Kill processes, or stop them for good, and wait until their successors are ready.

    Raises PdlaunchError when they are not back in time.
    """
    processes = deployment.processes()
    old = {each: processes[each] for each in name.split("+")}
    killed_at = time.monotonic()
    for process in old.values():
        process.send_signal(signal_number)
    while time.monotonic() < killed_at + timeout_s:
        await asyncio.sleep(0.05)
        if await asyncio.to_thread(
            _are_back, deployment, {each: process.pid for each, process in old.items()}
        ):
            return Kill(name, killed_at, time.monotonic() - killed_at)
    raise PdlaunchError(f"{name} did not come back within {timeout_s:g} s:\n{deployment.output()}")


def _are_back(deployment: Deployment, old_pids: Mapping[str, int]) -> bool:
    new = deployment.processes()
    if any(name not in new or new[name].pid == pid for name, pid in old_pids.items()):
        return False
    engines = {name.partition("/")[0] for name in old_pids} - {"router"}
    try:
        states = {
            engine["name"]: engine["state"]
            for engine in engines_of(Api(deployment.url, timeout_s=5))
        }
        # An engine whose server and ranks are dead is not listed at all.
        if not (states.keys() >= engines and set(states.values()) == {"ready"}):
            return False
        # A router that is new itself has yet to hear that an engine's ranks are gone.
        admin = admin_api(deployment.url)
        return all(admin.engine(engine).get("/pdlaunch/integrity")[0] == 200 for engine in engines)
    except PdlaunchError:
        return False
