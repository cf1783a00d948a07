"""A prefill rank dies after its answers: what it has leased is pulled from the memory that it
leaves behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from pdlaunch.client.api import Api
from pdlaunch.client.deployment import Deployment, running_deployment
from pdlaunch.client.smoke import engines_of
from tests.e2e.api import complete, count_now, engine_apis, idle
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import TINY
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.e2e.waiting import await_true

NUM_TOKENS = 8
PROMPT, SPOILED_PROMPT = list(range(40, 140)), list(range(10, 90))
P2P = {
    "PDLAUNCH_KV_TRANSFER__PATH": "p2p",
    # Memory that goes earlier does so because it is used up.
    "PDLAUNCH_KV_TRANSFER__LEASE_S": "600",
}


def test_the_death_of_a_prefill_rank_after_its_answer_costs_nothing(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    expected, spoiled_expected = greedy(model, [PROMPT, SPOILED_PROMPT], NUM_TOKENS)
    with running_deployment(
        ("--model", str(model), *TINY), environ=clean_environ() | P2P
    ) as deployment:
        prefill, decode = (api_of(deployment, role) for role in ("prefill", "decode"))
        victim, reader = (
            deployment.processes()[f"{role}-0/rank-0"] for role in ("prefill", "decode")
        )
        left_behind = kv_files(victim)
        assert left_behind
        assert left_behind <= kv_files(reader)

        spoiled = hand_over(prefill, SPOILED_PROMPT)
        spoil_kv_memory(victim)
        handed = hand_over(prefill, PROMPT)
        victim.kill()
        await_true(
            lambda: state_of(deployment, "prefill-0") != "ready", "the supervisor sees the death"
        )

        # The answer of the dead is as good as that of the living.
        assert complete(decode, PROMPT, NUM_TOKENS, kv_transfer_params=handed) == expected
        assert counts(decode) == {
            "transfers": 1,
            "departed_transfers": 1,
            "recomputed_requests": 0,
            "verification_failures": 0,
        }
        assert left_behind <= kv_files(reader)

        # Bytes that are not those of the answer are found, and computed again.
        assert (
            complete(decode, SPOILED_PROMPT, NUM_TOKENS, kv_transfer_params=spoiled)
            == spoiled_expected
        )
        found = counts(decode)
        assert (found["transfers"], found["recomputed_requests"]) == (1, 1)
        assert found["verification_failures"] > 0

        # Nothing is left to be read.
        await_true(
            lambda: not left_behind & kv_files(reader), "the memory of the dead rank is unmapped"
        )
        await_true(lambda: idle(deployment.url), "nothing leased or quarantined")


def api_of(deployment: Deployment, role: str) -> Api:
    return engine_apis(deployment.url, role)[0]


def state_of(deployment: Deployment, name: str) -> str:
    return next(
        str(engine["state"]) for engine in engines_of(Api(deployment.url)) if engine["name"] == name
    )


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


def counts(engine: Api) -> dict[str, float]:
    names = ("transfers", "departed_transfers", "recomputed_requests", "verification_failures")
    return {name: count_now(engine, name) for name in names}


def kv_files(process: psutil.Process) -> set[str]:
    """Inodes of the memory for KV blocks and scratch that a process has mapped."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:pdlaunch-kv" in line}


def spoil_kv_memory(process: psutil.Process) -> None:
    """Change a byte of every KiB, as a fault in the memory would."""
    folder = Path(f"/proc/{process.pid}")
    with (folder / "mem").open("r+b", buffering=0) as memory:
        for line in (folder / "maps").read_text().splitlines():
            if "/memfd:pdlaunch-kv" in line:
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                memory.seek(start)
                content = bytearray(memory.read(end - start))
                content[::1024] = bytes(byte ^ 1 for byte in content[::1024])
                memory.seek(start)
                memory.write(content)
