"""A prefill rank dies after its answers: decode computes the prompts again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from pdlaunch.launch.client.smoke import engines_of
from tests.e2e.api import complete, count_now, engine_apis, idle
from tests.e2e.conftest import default_environ
from tests.e2e.faults import TINY
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.e2e.waiting import await_true

NUM_TOKENS = 8
PROMPT = list(range(40, 140))
P2P = {"PDLAUNCH_KV_TRANSFER__NIXL__PATH": "p2p", "PDLAUNCH_KV_TRANSFER__LEASE_S": "600"}


def test_what_a_dead_prefill_rank_has_leased_is_computed_again(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    (expected,) = greedy(model, [PROMPT], NUM_TOKENS)
    with running_deployment(
        ("--model", str(model), *TINY), environ=default_environ() | P2P
    ) as deployment:
        prefill, decode = (api_of(deployment, role) for role in ("prefill", "decode"))
        victim, reader = (
            deployment.processes()[f"{role}-0/rank-0"] for role in ("prefill", "decode")
        )
        left_behind = kv_files(victim)
        assert left_behind
        assert left_behind <= kv_files(reader)

        handed = hand_over(prefill, PROMPT)
        victim.kill()
        await_true(
            lambda: state_of(deployment, "prefill-0") != "ready", "the supervisor sees the death"
        )

        assert complete(decode, PROMPT, NUM_TOKENS, kv_transfer_params=handed) == expected
        assert (count_now(decode, "transfers"), count_now(decode, "recomputed_requests")) == (0, 1)
        await_true(
            lambda: not left_behind & kv_files(reader), "the memory of the dead rank is unmapped"
        )
        await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def api_of(deployment: Deployment, role: str) -> Api:
    return engine_apis(deployment.url, role)[0]


def state_of(deployment: Deployment, name: str) -> str:
    states = {engine["name"]: engine["state"] for engine in engines_of(Api(deployment.url))}
    return str(states.get(name, "gone"))


def hand_over(prefill: Api, prompt: list[int]) -> dict[str, Any]:
    """What decode is given of a prompt that prefill has computed."""
    body = {
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {"do_remote_decode": True},
    }
    status, answer = prefill.post("/v1/completions", body)
    assert status == 200, answer
    params: dict[str, Any] = answer["kv_transfer_params"]
    return params


def kv_files(process: psutil.Process) -> set[str]:
    """Inodes of the memory for KV blocks and scratch that a process has mapped."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:pdlaunch-kv" in line}
