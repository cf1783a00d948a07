"""The promise under faults: right tokens or a clear error, nothing leaks. ``reliability.py`` is the
long version.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete, engine_apis, streamed
from tests.e2e.faults import (
    SHORT_DEADLINES,
    faulty_deployment,
    left_over,
    num_migrations,
    tracebacks,
)
from tests.e2e.listening import await_unlocked_ports
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.labs.kills import load_with_kills
from tests.labs.known_answers import SoakOptions, soak

FAULTS = {"seed": 3, "rate": 0.2, "slow_s": 0.1, "lost_s": 2, "lease_rate": 0.1}
PROMPT = list(range(40, 100))
LONG_OUTPUT_TOKENS = 1500


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tp_deployment(tiny_model: Path) -> Iterator[Deployment]:
    """Prefill with three ranks, decode with one, over NIXL; its transfers are faulty."""
    # Each pull takes three READs, and one that fails ends the others: more faults would leave
    # hardly any that succeeds.
    environ = SHORT_DEADLINES | {"PDLAUNCH_KV_TRANSFER__NIXL__PATH": "nixl"}
    with faulty_deployment(
        tiny_model, FAULTS | {"rate": 0.06}, "--prefill-tp", "3", environ=environ
    ) as deployment:
        yield deployment


def test_faulty_transfers_change_no_token(tp_deployment: Deployment, tiny_model: Path) -> None:
    assert complete(tp_deployment.url, PROMPT, 16) == greedy(tiny_model, [PROMPT], 16)[0]
    report = asyncio.run(
        soak(SoakOptions(url=tp_deployment.url, num_requests=120, num_cases=24, requests_a_salt=3))
    )
    assert report.failures == []
    assert report.outcomes["equal"] > 60
    assert report.totals["transfer_failures"] > 0
    assert report.totals["pull_retries"] > 0
    assert report.totals["recomputed_requests"] > 0


def test_all_listeners_are_on_loopback(tp_deployment: Deployment) -> None:
    """Supervisor, router, servers and the ranks of a TP group, torch's store and UCX included."""
    children = tp_deployment.processes().values()
    listeners = {
        process.pid: listening_hosts(process)
        for process in [psutil.Process(tp_deployment.process.pid), *children]
    }
    assert set().union(*listeners.values()) == {"127.0.0.1"}
    assert len(children) == 7
    assert all(listeners[child.pid] for child in children)


def test_gloo_alone_listens_without_asking_who_comes(tp_deployment: Deployment) -> None:
    """NIXL does not: with UCX's TCP transport each of the ranks would. Gloo is what PD425 warns
    of.
    """
    await_unlocked_ports(tp_deployment, {f"prefill-0/rank-{tp_rank}": 1 for tp_rank in range(3)})


def listening_hosts(process: psutil.Process) -> set[str]:
    """Where it accepts connections or datagrams."""
    connections = process.net_connections(kind="inet")
    return {
        each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN or not each.raddr
    }


def test_kv_transfer_params_of_any_kind_are_answered(
    tp_deployment: Deployment, tiny_model: Path
) -> None:
    """Right tokens or 400, and the engine lives on."""
    source = random.Random(5)
    expected = greedy(tiny_model, [PROMPT], 4)[0]
    (prefill,), (decode,) = (engine_apis(tp_deployment.url, role) for role in ("prefill", "decode"))
    body = {
        "prompt": PROMPT,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    _, handed = prefill.post(
        "/v1/completions",
        body | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}},
    )
    statuses = set()
    for params in spoiled(handed["kv_transfer_params"], source):
        status, answer = decode.post("/v1/completions", body | {"kv_transfer_params": params})
        statuses.add(status)
        assert status in (200, 400), (params, answer)
        if status == 200:
            assert answer["choices"][0]["token_ids"] == expected, params
        else:
            assert answer["error"]["param"].startswith("kv_transfer_params")
    assert statuses == {200, 400}
    assert left_over(tp_deployment) == []


def spoiled(params: dict[str, Any], source: random.Random) -> list[Any]:
    """``params`` with each member missing, of another type, huge, or somebody else's."""
    # The first token is a member like any other here; a wrong one would be a wrong answer of the
    # caller's own making.
    base = {key: value for key, value in params.items() if key != "pdlaunch"}
    odd: list[Any] = [
        None,
        True,
        -1,
        2**70,
        1.5,
        "",
        "x" * 100_000,
        [],
        [[]],
        [[-1]],
        [["a"]],
        {},
        {"a": [1]},
        [[1] * 50_000],
    ]
    found: list[Any] = [
        base,
        [],
        "x",
        7,
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "do_remote_decode": True},
    ]
    for key in base:
        found.append({name: value for name, value in base.items() if name != key})
        found += [base | {key: value} for value in source.sample(odd, 4)]
    foreign: dict[str, Any] = {
        "remote_engine_id": "f" * 32,
        "remote_request_id": "somebody-elses",
        "remote_host": "192.0.2.1",
        "remote_port": 9,
    }
    found += [base | {key: value} for key, value in foreign.items()]
    ours: list[Any] = [
        None,
        1,
        [],
        {"first_tokens": 1},
        {"first_tokens": [{}]},
        {"awaits_lease": True},
    ]
    ours += [
        {name: value}
        for name in ("lease_id", "awaits_lease", "first_token_sent")
        for value in source.sample(odd, 3)
    ]
    found += [base | {"pdlaunch": value} for value in ours]
    found.append(base | {"pdlaunch": {"first_tokens": [{"token_id": 10**9}]}})
    return [
        params
        for params in found
        # Asks for another prefill, which is another kind of answer.
        if not (
            isinstance(params, dict)
            and params.get("do_remote_decode") is True
            and not params.get("do_remote_prefill")
        )
    ]


def test_killed_ranks_lose_no_request_of_a_hybrid_model(tmp_path: Path) -> None:
    """Faults, cancels and ``kill -9`` of either engine: streams go on without gap or repetition,
    and every block comes back.
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
        kill_in_the_middle_of_a_stream(deployment, "decode-0/rank-0")
        assert left_over(deployment) == []
        assert set(deployment.processes()) == {
            "router",
            "prefill-0",
            "decode-0",
            "prefill-0/rank-0",
            "decode-0/rank-0",
        }
        assert tracebacks(deployment) == {}


def kill_in_the_middle_of_a_stream(deployment: Deployment, name: str) -> None:
    """The stream's end is seconds away when its first tokens have come; it is left once another
    engine goes on with it.
    """
    alone, *_ = engine_apis(deployment.url, "prefill")
    before = num_migrations(deployment)
    with streamed(deployment.url, PROMPT, LONG_OUTPUT_TOKENS) as token_ids:
        found = list(islice(token_ids, 5))
        deployment.processes()[name].kill()
        while num_migrations(deployment) == before:
            found.append(next(token_ids))
        found += islice(token_ids, 50)
    assert found == complete(alone, PROMPT, len(found), cache_salt="reference")
