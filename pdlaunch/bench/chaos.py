"""``pdlaunch smoke --chaos SEED``: kills a rank while transfers fail, bytes change and leases end
early, and checks that the promises hold.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time

from pdlaunch.bench.known_answers import SoakOptions, SoakReport, make_cases, soak
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.integrity import engines_of
from pdlaunch.launch.client.smoke import Check

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
    counted = ("transfer_failures", "leases_expired", "router_engine_failures")
    num_faults = sum(report.totals[name] for name in counted)
    kind = "the tokens of one engine alone" if exact else "an answer"
    end = f"{report.num_requests} requests under faults end with {kind}"
    return [
        Check(end, seconds, wrong_answers(report, exact=exact)),
        # Both looked at the same run, whose time the first check has.
        Check("no block and no request is left", 0.0, "; ".join(report.left) or None),
        Check("faults were injected", 0.0, None if num_faults else "no transfer failed"),
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
    load = asyncio.create_task(soak(options, await make_cases(options)))
    await asyncio.sleep(random.Random(options.seed).uniform(0.5, 2))
    ranks = [name for name in deployment.processes() if name.endswith("/rank-0")]
    decode_first = max(ranks, key=lambda name: name.startswith("decode"))
    await kill_and_wait(deployment, decode_first, signal.SIGKILL)
    return await load


async def kill_and_wait(
    deployment: Deployment, names: str, signal_number: int, timeout_s: float = 300.0
) -> None:
    """Kill processes, joined by ``+``, or stop them; return when their successors are ready.

    Raises PdlaunchError when they are not back in time.
    """
    processes = deployment.processes()
    old = {name: processes[name] for name in names.split("+")}
    pids = {name: process.pid for name, process in old.items()}
    for process in old.values():
        process.send_signal(signal_number)
    deadline_at = time.monotonic() + timeout_s
    while not await asyncio.to_thread(_are_back, deployment, pids):
        if time.monotonic() > deadline_at:
            raise PdlaunchError(
                f"{names} did not come back within {timeout_s:g} s:\n{deployment.output()}"
            )
        await asyncio.sleep(0.05)


def _are_back(deployment: Deployment, old_pids: dict[str, int]) -> bool:
    new = deployment.processes()
    if any(name not in new or new[name].pid == pid for name, pid in old_pids.items()):
        return False
    engines = {name.partition("/")[0] for name in old_pids} - {"router"}
    try:
        listed = engines_of(Api(deployment.url, timeout_s=5))
        states = {engine["name"]: engine["state"] for engine in listed}
        # An engine whose server and ranks are dead is not listed at all.
        if not (states.keys() >= engines and set(states.values()) == {"ready"}):
            return False
        # A router that is new itself has yet to hear that an engine's ranks are gone.
        admin = admin_api(deployment.url)
        return all(admin.engine(engine).get("/pdlaunch/integrity")[0] == 200 for engine in engines)
    except PdlaunchError:
        return False
