"""Deployments of tiny models whose transfers are faulty and whose processes are killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pdlaunch.client.admin import admin_api
from pdlaunch.client.api import Api
from pdlaunch.client.deployment import Deployment, running_deployment
from pdlaunch.client.integrity import await_idle
from pdlaunch.client.smoke import engines_of
from pdlaunch.errors import PdlaunchError
from pdlaunch.testing.soak import SoakOptions, SoakReport, make_cases, run_load, soak_session
from tests.e2e.conftest import clean_environ
from tests.e2e.waiting import await_true

TINY = ("--dtype", "float32", "--kv-cache-memory", "2MiB")
SHORT_DEADLINES = {
    "PDLAUNCH_KV_TRANSFER__LEASE_S": "3",
    "PDLAUNCH_KV_TRANSFER__PULL_TIMEOUT_S": "1.5",
}


@contextmanager
def faulty_deployment(
    model: Path,
    faults: Mapping[str, Any] | None,
    *arguments: str,
    environ: Mapping[str, str] = SHORT_DEADLINES,
) -> Iterator[Deployment]:
    """One prefill and one decode engine; ``faults``: fields of ``FaultPlan``."""
    plan = {} if faults is None else {"PDLAUNCH_ENV__PDLAUNCH_CHAOS": json.dumps(faults)}
    command = ("--model", str(model), *TINY, *arguments)
    # Prompts take several steps: faults meet chunked prefills too.
    chunks = {"PDLAUNCH_MAX_NUM_BATCHED_TOKENS": "96"}
    with running_deployment(
        command, environ=clean_environ() | chunks | dict(environ) | plan
    ) as deployment:
        yield deployment


@contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    """A process that does nothing for as long as the block runs."""
    process.suspend()
    try:
        # Its threads go on until the one that got the signal has had its turn.
        await_true(lambda: process.status() == psutil.STATUS_STOPPED, "the process is stopped")
        yield
    finally:
        process.resume()


@dataclass
class Kill:
    """One ``kill -9``, or ``SIGSTOP``, and what clients saw of it; all seconds are counted from
    it.
    """

    process: str
    killed_s: float
    """Monotonic clock."""
    ready_s: float
    """Until the router could use the engine again."""
    num_in_flight: int = 0
    num_lost: int = 0
    """Of those in flight: errors, even those that say why."""
    longest_gap_s: float = 0.0
    """Between two tokens that a client of these saw."""


async def load_with_kills(
    deployment: Deployment,
    options: SoakOptions,
    processes: list[str],
    source: random.Random,
    *,
    pause_s: tuple[float, float],
    signal_number: int = signal.SIGKILL,
) -> tuple[SoakReport, list[Kill]]:
    """Kill each of ``processes`` in turn under load; the load ends when the last one is back, or
    with its last request.

    Those whose names are joined by ``+`` are killed at once.
    """
    stop = asyncio.Event()
    kills: list[Kill] = []
    buried: Counter[str] = Counter()

    async def kill_all() -> None:
        for name in processes:
            await asyncio.sleep(source.uniform(*pause_s))
            for rank in [each for each in name.split("+") if "/rank-" in each]:
                buried.update(
                    await asyncio.to_thread(counters_of, deployment, rank.partition("/")[0])
                )
            kills.append(await kill_and_wait(deployment, name, signal_number))
        await asyncio.sleep(pause_s[0])

    async with soak_session(options) as session:
        cases = await make_cases(options)
        killer = asyncio.create_task(kill_all())
        killer.add_done_callback(lambda _: stop.set())  # a kill that went wrong ends the load, too
        report = await run_load(session, options, cases, stop=stop)
        await end(killer)
    report.totals = {name: round(value + buried[name], 3) for name, value in report.totals.items()}
    for kill in kills:
        hit = [sent for sent in report.sent if sent.start_s <= kill.killed_s <= sent.end_s]
        kill.num_in_flight = len(hit)
        kill.num_lost = sum(sent.outcome not in ("equal", "cancelled") for sent in hit)
        kill.longest_gap_s = max((sent.longest_gap_s for sent in hit), default=0.0)
    return report, kills


def counters_of(deployment: Deployment, engine: str) -> dict[str, float]:
    """What a rank has counted, which dies with it."""
    stats = json.loads(admin_api(deployment.url).engine(engine).get("/pdlaunch/integrity")[1])[
        "stats"
    ]
    return {name: value for name, value in stats.items() if not name.startswith("num_")}


async def end(killer: asyncio.Task[None]) -> None:
    """Raises what has gone wrong in it."""
    killer.cancel()
    with suppress(asyncio.CancelledError):
        await killer


async def kill_and_wait(
    deployment: Deployment, name: str, signal_number: int, timeout_s: float = 300.0
) -> Kill:
    """Kill a process or several, or stop them for good, and wait until their successors are
    ready.
    """
    processes = deployment.processes()
    old = {each: processes[each] for each in name.split("+")}
    killed_s = time.monotonic()
    for process in old.values():
        process.send_signal(signal_number)
    while time.monotonic() < killed_s + timeout_s:
        await asyncio.sleep(0.05)
        if await asyncio.to_thread(
            _are_back, deployment, {each: process.pid for each, process in old.items()}
        ):
            return Kill(name, killed_s, time.monotonic() - killed_s)
    raise AssertionError(f"{name} did not come back within {timeout_s:g} s:\n{deployment.output()}")


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


def tracebacks(deployment: Deployment) -> dict[str, int]:
    """How many there are in which log: expected deaths and restarts are one line each."""
    counts = {
        path.name: path.read_text(errors="replace").count("Traceback")
        for path in deployment.log_dir.iterdir()
    }
    return {name: count for name, count in counts.items() if count}


def left_over(deployment: Deployment) -> list[str]:
    """What the engines' books hold once everything has ended."""
    return await_idle(admin_api(deployment.url), timeout_s=180)


def num_migrations(deployment: Deployment) -> float:
    return Api(deployment.url).metrics()["pdlaunch_router_migrations_total"]
