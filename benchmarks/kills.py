"""Kills processes of a deployment under load, again and again, for ``make soak`` and ``make
kills``.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.known_answers import SoakOptions, SoakReport, counters, make_cases, soak
from tests.e2e.agreement import engines_of
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.waiting import await_true


@dataclass
class Kill:
    """Records one ``kill -9``, or ``SIGSTOP``, and what clients saw of it."""

    killed_at: float
    """Instant of the monotonic clock."""
    ready_s: float
    """Time from the kill until the router could use the engine again."""
    num_in_flight: int = 0
    num_lost: int = 0
    """Requests in flight that ended with an error, even one with a reason."""
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
        for names in processes:
            await asyncio.sleep(source.uniform(*pause_s))
            for name in names.split("+"):
                if "/rank-" in name:
                    # Its counters die with it.
                    engine = admin_api(deployment.url).engine(name.partition("/")[0])
                    path = "/pdlaunch/integrity"
                    _, told = await asyncio.to_thread(engine.get_object, path)
                    counted_before.update(counters(told))
            killed_at = time.monotonic()
            await asyncio.to_thread(kill_and_wait, deployment, names, signal_number)
            kills.append(Kill(killed_at, time.monotonic() - killed_at))
        await asyncio.sleep(pause_s[0])

    cases = await make_cases(options)
    killer = asyncio.create_task(kill_all())
    killer.add_done_callback(lambda _: stop.set())  # a kill that went wrong ends the load, too
    report = await soak(options, cases, stop=stop)
    killer.cancel()
    with suppress(asyncio.CancelledError):
        await killer
    counted_before.update(report.totals)
    report.totals = {name: round(value, 3) for name, value in counted_before.items()}
    for kill in kills:
        hit = [sent for sent in report.sent if sent.start_at <= kill.killed_at <= sent.end_at]
        kill.num_in_flight = len(hit)
        kill.num_lost = sum(sent.outcome not in ("equal", "cancelled") for sent in hit)
        kill.longest_gap_s = max((sent.longest_gap_s for sent in hit), default=0.0)
    return report, kills


def kill_and_wait(deployment: Deployment, names: str, signal_number: int) -> None:
    """Kill processes, joined by ``+``, or stop them; return when their successors are ready."""
    processes = deployment.processes()
    old = {name: processes[name] for name in names.split("+")}
    pids = {name: process.pid for name, process in old.items()}
    for process in old.values():
        process.send_signal(signal_number)
    what = f"{names} are back"
    await_true(lambda: are_back(deployment, pids), lambda: f"{what}\n{deployment.output()}", 300)


def are_back(deployment: Deployment, old_pids: Mapping[str, int]) -> bool:
    new = deployment.processes()
    if any(name not in new or new[name].pid == pid for name, pid in old_pids.items()):
        return False
    engines = {name.partition("/")[0] for name in old_pids} - {"router"}
    listed = engines_of(Api(deployment.url, timeout_s=5))
    states = {engine["name"]: engine["state"] for engine in listed}
    # An engine whose server and ranks are dead is not listed at all.
    if not (states.keys() >= engines and set(states.values()) == {"ready"}):
        return False
    # A router that is new itself has yet to hear that an engine's ranks are gone.
    admin = admin_api(deployment.url)
    return all(admin.engine(engine).get("/pdlaunch/integrity")[0] == 200 for engine in engines)
