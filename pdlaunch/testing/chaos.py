"""``pdlaunch smoke --chaos SEED``: the same promise while transfers fail, bytes change, leases end
early and a rank dies.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

from pdlaunch.client.deployment import Deployment
from pdlaunch.client.smoke import Check
from pdlaunch.testing.soak import SoakOptions, SoakReport, make_cases, run_load, soak_session

NUM_REQUESTS = 60
RATE = 0.2
"""Share of the READs that meet a fault."""
_RESTART_TIMEOUT_S = 120.0
_POLL_S = 0.2


def chaos_environment(seed: int) -> dict[str, str]:
    """Settings of a deployment whose transfers are faulty, as variables: ranks read the plan in
    their environment.
    """
    return {"PDLAUNCH_ENV__PDLAUNCH_CHAOS": json.dumps({"seed": seed, "rate": RATE})}


def smoke_under_chaos(
    deployment: Deployment, seed: int, *, api_key: str | None, exact: bool
) -> list[Check]:
    """Load with known answers and one ``kill -9``. ``exact``: it computes in float32; else greedy
    answers may differ.
    """
    start_s = time.monotonic()
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
    seconds = round(time.monotonic() - start_s, 3)
    wrong = ("wrong",) if exact else ()
    answers = [
        f"{report.outcomes[kind]} {kind}"
        for kind in (*wrong, "broken", "stuck", "error")
        if report.outcomes[kind]
    ]
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
            "; ".join([*answers, *report.details]) if answers else None,
        ),
        # Both looked at the same run, whose time the first check has.
        Check("no block and no request is left", 0.0, "; ".join(report.left) or None),
        Check("faults were injected", 0.0, None if faults else "no transfer failed"),
    ]


async def _load_and_kill(deployment: Deployment, options: SoakOptions) -> SoakReport:
    async with soak_session(options) as session:
        cases = await make_cases(options)
        load = asyncio.create_task(run_load(session, options, cases))
        await asyncio.sleep(random.Random(options.seed).uniform(0.5, 2))
        await _kill_a_rank(deployment)
        return await load


async def _kill_a_rank(deployment: Deployment) -> None:
    """Of a decode engine, and wait until its successor is there."""
    ranks = {
        name: process
        for name, process in deployment.processes().items()
        if name.endswith("/rank-0")
    }
    name = max(ranks, key=lambda name: name.startswith("decode"))
    ranks[name].kill()
    deadline_s = time.monotonic() + _RESTART_TIMEOUT_S
    while time.monotonic() < deadline_s:
        new = deployment.processes().get(name)
        if new is not None and new.pid != ranks[name].pid:
            return
        await asyncio.sleep(_POLL_S)
