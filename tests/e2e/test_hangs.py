"""Ranks that are stopped in the middle of their work (``SIGSTOP``), and a prefill rank that dies
after its answers.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tests.e2e.api import await_ready, complete, count_now, engine_apis, idle, states, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import clean_environ, launched
from tests.e2e.faults import left_over, num_migrations, tracebacks
from tests.e2e.tiny_models import greedy
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 140))
RANKS = ("prefill-0/rank-0", "decode-0/rank-0")
ENVIRON = {
    "PDLAUNCH_HANG_TIMEOUT_S": "5",
    "PDLAUNCH_KV_TRANSFER__NIXL__PATH": "p2p",
    "PDLAUNCH_KV_TRANSFER__LEASE_S": "600",
}


@pytest.fixture(scope="module")
def deployment(llama: Path) -> Iterator[Deployment]:
    with launched(llama, environ=clean_environ() | ENVIRON) as deployment:
        yield deployment


def test_what_a_dead_prefill_rank_has_leased_is_computed_again(
    deployment: Deployment, llama: Path
) -> None:
    (expected,) = greedy(llama, [PROMPT], 8)
    (prefill,), (decode,) = (engine_apis(deployment.url, role) for role in ("prefill", "decode"))
    victim, reader = (deployment.processes()[name] for name in RANKS)
    left_behind = kv_files(victim)
    assert left_behind
    assert left_behind <= kv_files(reader)

    params = {"kv_transfer_params": {"do_remote_decode": True}}
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    status, handed = prefill.post("/v1/completions", body | params)
    assert status == 200, handed
    victim.kill()
    await_true(
        lambda: states(deployment.url).get("prefill-0") != "ready", "the supervisor sees the death"
    )
    before = count_now(decode, "kv_transfers"), count_now(decode, "kv_recomputed_requests")
    handed_over = {"kv_transfer_params": handed["kv_transfer_params"]}
    assert complete(decode, PROMPT, 8, **handed_over) == expected
    after = count_now(decode, "kv_transfers"), count_now(decode, "kv_recomputed_requests")
    assert after == (before[0], before[1] + 1)
    await_true(
        lambda: not left_behind & kv_files(reader), "the memory of the dead rank is unmapped"
    )
    await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def kv_files(process: psutil.Process) -> set[str]:
    """Inodes of the KV and scratch memory that a process has mapped."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:pdlaunch-kv" in line}


def test_stopped_ranks_are_restarted_and_their_requests_go_on(deployment: Deployment) -> None:
    """Both ranks are stopped at once, decode in the middle of a stream, prefill with a prompt.
    Servers and router never hang.
    """
    await_ready(deployment.url)
    processes, migrations = deployment.processes(), num_migrations(deployment)
    num_ends = process_ends(deployment)
    with ThreadPoolExecutor(1) as pool:
        with streamed(deployment.url, PROMPT, 1500) as token_ids:
            # The end of the stream is seconds away at this point.
            found = list(islice(token_ids, 5))
            for name in RANKS:
                processes[name].suspend()
            request = pool.submit(complete, deployment.url, PROMPT, 16, cache_salt="new")
            while num_migrations(deployment) == migrations:
                found.append(next(token_ids))
            found += islice(token_ids, 50)
        answer = request.result()
    await_ready(deployment.url)
    expected = complete(deployment.url, PROMPT, len(found), cache_salt="reference")
    assert (found, answer) == (expected, expected[:16])
    assert left_over(deployment) == []
    now = deployment.processes()
    assert {name for name in now if now[name].pid != processes[name].pid} == set(RANKS)
    assert all(f"{name} hung" in deployment.output() for name in RANKS)
    assert process_ends(deployment) - num_ends == len(RANKS), "no server and no router"
    assert tracebacks(deployment) == {}


def process_ends(deployment: Deployment) -> float:
    return Api(deployment.url).metrics()["pdlaunch_process_ends_total"]
