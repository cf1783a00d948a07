"""``pdlaunch smoke --chaos SEED``: kills a rank under load while transfers fail, bytes change and
leases end early, and checks that every answer is that of one engine alone.
"""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pdlaunch.errors import PdlaunchError
from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.integrity import await_idle, engine_totals, engines_of
from pdlaunch.launch.client.smoke import Check

NUM_REQUESTS = 60  # requests at least; more are sent until the rank that was killed is back
NUM_CASES = 16
CONCURRENCY = 4
RATE = 0.2  # share of the READs that meet a fault
MAX_TOLD = 20  # requests that went wrong, of which a report says when


Sent = tuple[str, float]
"""A request's outcome (``equal``, ``wrong``, ``error`` or ``broken``) and duration in seconds."""


def faulty_settings(seed: int, connector: str) -> dict[str, object]:
    """Return the settings that put connector ``faulty`` around ``connector``, by dotted path."""
    faults = {"inner": connector, "seed": seed, "rate": RATE}
    return {"kv_transfer.connector": "faulty"} | {
        f"kv_transfer.faulty.{name}": value for name, value in faults.items()
    }


def smoke_under_chaos(
    deployment: Deployment, seed: int, *, api_key: str | None, exact: bool
) -> list[Check]:
    """Send prompts whose answers one engine alone has given, and kill a rank meanwhile.

    ``exact``: the deployment computes in float32; in other dtypes greedy answers may differ. Raises
    PdlaunchError.
    """
    start_at, source = time.monotonic(), random.Random(seed)
    # Pairs, as transfers are what is to fail.
    router = Api(deployment.url, api_key, headers={ROUTE_HEADER: WANTS_PAIR})
    admin = admin_api(deployment.url)
    bodies = [_random_body(source) for _ in range(NUM_CASES)]
    alone = next(each["name"] for each in engines_of(admin) if each["role"] in ("decode", "both"))
    answers = [_ask(admin.engine(alone), body, "reference") for body in bodies]
    if any(status != 200 for status, _ in answers):
        raise PdlaunchError(f"{alone} alone does not answer every prompt")
    expected = [token_ids for _, token_ids in answers]
    numbers, is_back, sent = itertools.count(), threading.Event(), list[Sent]()

    def work() -> None:
        while (number := next(numbers)) < NUM_REQUESTS or not is_back.is_set():
            case, began_at = number % NUM_CASES, time.monotonic()
            # Neighbours share prefixes, later ones are pulled again.
            salt = f"{seed}/{number // NUM_CASES}"
            outcome = _outcome(router, bodies[case], salt, expected[case])
            sent.append((outcome, time.monotonic() - began_at))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        working = [pool.submit(work) for _ in range(CONCURRENCY)]
        try:
            # The kill meets requests in flight, at another place with each seed.
            time.sleep(source.uniform(0.5, 2))
            ranks = [name for name in deployment.processes() if name.endswith("/rank-0")]
            decode_first = max(ranks, key=lambda name: name.startswith("decode"))
            kill_and_wait(deployment, decode_first, signal.SIGKILL)
        finally:
            # Stop the workers after a failure, too: they would send for ever.
            is_back.set()
        for each in working:
            each.result()
    left, totals = await_idle(admin, timeout_s=60.0), engine_totals(admin)
    counted = ("transfer_failures", "leases_expired", "router_engine_failures")
    kind = "the tokens of one engine alone" if exact else "an answer"
    seconds = round(time.monotonic() - start_at, 3)
    wrong, faults = wrong_answers(sent, exact=exact), sum(totals[name] for name in counted)
    return [
        Check(f"{len(sent)} requests under faults end with {kind}", seconds, wrong),
        # Both looked at the same run, whose time the first check has.
        Check("no block and no request is left", 0.0, "; ".join(left) or None),
        Check("faults were injected", 0.0, None if faults else "no transfer failed"),
    ]


def wrong_answers(sent: Sequence[Sent], *, exact: bool) -> str | None:
    """Say how many requests went wrong, and when, but not what was asked and answered: reports are
    passed on. None: all went well.
    """
    bad = {"broken", "error", "wrong"} if exact else {"broken", "error"}
    failed = [(outcome, seconds) for outcome, seconds in sent if outcome in bad]
    counts = [f"{n} {kind}" for kind, n in Counter(outcome for outcome, _ in failed).items()]
    told = [f"{outcome} after {seconds:.1f} s" for outcome, seconds in failed[:MAX_TOLD]]
    return "; ".join([*counts, *told]) or None


def _random_body(source: random.Random) -> dict[str, Any]:
    prompt = [source.randrange(3, 200) for _ in range(source.randint(1, 120))]
    body = {"prompt": prompt, "max_tokens": source.randint(1, 24), "temperature": 0}
    return body | {"ignore_eos": True, "return_token_ids": True}


def _ask(api: Api, body: Mapping[str, Any], salt: str) -> tuple[int, list[int]]:
    """Return the status and the tokens of an answer. Raises PdlaunchError and LookupError."""
    status, answer = api.post("/v1/completions", {**body, "cache_salt": salt})
    return status, answer["choices"][0]["token_ids"] if status == 200 else []


def _outcome(api: Api, body: Mapping[str, Any], salt: str, expected: list[int]) -> str:
    try:
        status, token_ids = _ask(api, body, salt)
    except (PdlaunchError, LookupError):
        return "broken"
    if status != 200:
        # 500 is a bug of ours, which tells the client nothing.
        return "broken" if status == 500 else "error"
    return "equal" if token_ids == expected else "wrong"


def kill_and_wait(
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
    while not _are_back(deployment, pids):
        if time.monotonic() > deadline_at:
            raise PdlaunchError(
                f"{names} did not come back within {timeout_s:g} s:\n{deployment.output()}"
            )
        time.sleep(0.05)


def _are_back(deployment: Deployment, old_pids: Mapping[str, int]) -> bool:
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
