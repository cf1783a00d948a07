"""Runs ``pdlaunch smoke --chaos SEED``: the promises hold while transfers fail, bytes change,
leases end early and a rank dies.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time

from pdlaunch.client.deployment import Deployment
from pdlaunch.client.smoke import Check
from pdlaunch.testing.kills import kill_and_wait
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
