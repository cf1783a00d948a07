"""Under faults, clients get right tokens or a clear error, and nothing leaks.
``benchmarks.reliability`` is the long version.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.kills import load_with_kills
from benchmarks.known_answers import SoakOptions, soak
from tests.e2e.api import complete
from tests.e2e.client import Deployment
from tests.e2e.faults import SHORT_DEADLINES, faulty_deployment, left_over, tracebacks
from tests.e2e.listening import all_processes, await_unlocked_ports
from tests.e2e.tiny_models import greedy, make_tiny_model

FAULTS = {"seed": 3, "rate": 0.2, "slow_s": 0.1, "lost_s": 2, "lease_rate": 0.1}
PROMPT = list(range(40, 100))


@pytest.fixture(scope="module")
def tp_deployment(llama: Path) -> Iterator[Deployment]:
    """Prefill with three ranks, decode with one, over NIXL; its transfers are faulty."""
    # Each pull has three READs, and a failed READ ends the others: with a higher rate, hardly any
    # pull would succeed.
    environ = SHORT_DEADLINES | {"PDLAUNCH_KV_TRANSFER__NIXL__PATH": "nixl"}
    with faulty_deployment(
        llama, FAULTS | {"rate": 0.06}, "--prefill-tp", "3", environ=environ
    ) as deployment:
        yield deployment


def test_faulty_transfers_change_no_token(tp_deployment: Deployment, llama: Path) -> None:
    assert complete(tp_deployment.url, PROMPT, 16) == greedy(llama, [PROMPT], 16)[0]
    report = asyncio.run(
        soak(SoakOptions(url=tp_deployment.url, num_requests=120, num_cases=24, requests_a_salt=3))
    )
    assert report.failures == []
    assert report.outcomes["equal"] > 60
    assert report.totals["kv_transfer_failures"] > 0
    assert report.totals["kv_pull_retries"] > 0
    assert report.totals["kv_recomputed_requests"] > 0


def test_all_listeners_are_on_loopback(tp_deployment: Deployment) -> None:
    """This holds for all processes, including torch's store and UCX in the ranks of a TP group."""
    processes = all_processes(tp_deployment)
    listeners = {name: listening_hosts(process) for name, process in processes.items()}
    assert set().union(*listeners.values()) == {"127.0.0.1"}
    assert len(listeners) == 8
    assert all(hosts for name, hosts in listeners.items() if name != "supervisor")


def test_gloo_alone_listens_without_asking_who_comes(tp_deployment: Deployment) -> None:
    """PD425 warns of gloo. NIXL does not listen; with UCX's TCP transport, each rank would."""
    await_unlocked_ports(tp_deployment, {f"prefill-0/rank-{tp_rank}": 1 for tp_rank in range(3)})


def listening_hosts(process: psutil.Process) -> set[str]:
    """The addresses at which a process accepts connections or datagrams."""
    connections = process.net_connections(kind="inet")
    return {
        each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN or not each.raddr
    }


@pytest.mark.e2e_long
def test_killed_ranks_lose_no_request_of_a_hybrid_model(tmp_path: Path) -> None:
    """After faults, cancels and ``kill -9`` of either engine, streams continue without gap or
    repetition, and every block is freed.
    """
    model = make_tiny_model("gemma3_text", tmp_path, max_model_len=2048)
    with faulty_deployment(
        model, FAULTS | {"rate": 0.05}, "--kv-cache-memory", "4MiB"
    ) as deployment:
        options = SoakOptions(
            url=deployment.url,
            num_requests=10**6,
            num_cases=24,
            concurrency=4,
            longest_output_tokens=150,
        )
        names = ["decode-0/rank-0", "prefill-0/rank-0"]
        report, kills = asyncio.run(
            load_with_kills(deployment, options, names, random.Random(1), pause_s=(1, 2))
        )
        assert len(kills) == 2
        assert report.failures == []
        assert report.outcomes["error"] == 0, report.details
        assert left_over(deployment) == []
        assert set(deployment.processes()) == {
            "router",
            "prefill-0",
            "decode-0",
            "prefill-0/rank-0",
            "decode-0/rank-0",
        }
        assert tracebacks(deployment) == {}
