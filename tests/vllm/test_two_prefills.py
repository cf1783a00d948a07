"""Two prefill engines and one decode engine of vLLM: at work, behind vllm-router, and killed."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment, held_port, running_deployment
from tests.e2e.agreement import engines_of
from tests.e2e.api import complete, streamed
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import lives
from tests.e2e.lone_router import needs_vllm_router, running_vllm_router
from tests.e2e.test_doors import answered
from tests.e2e.waiting import await_true
from tests.vllm.conftest import ARGUMENTS, START_TIMEOUT_S
from tests.vllm.kv_memory import engine_of
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of, states

pytestmark = pytest.mark.vllm_long

OTHER_ROUTER = "of-another-router"
LONG = 60
"""Tokens of a stream during which engines are killed."""
PREFILLS = ("prefill-0", "prefill-1")
ANSWERS = "vllm:request_success_total"
RUNNING = "vllm:num_requests_running"


@pytest.fixture(scope="module")
def launch(vllm_command: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Engines with ports and a key, as another router needs them."""
    config = tmp_path_factory.mktemp("launch") / "launch.yaml"
    with two_held_ports() as of_prefill, held_port() as of_decode:
        config.write_text(
            f"prefill: {{replicas: 2, port: {of_prefill}}}\n"
            f"decode: {{port: {of_decode}}}\n"
            "dtype: float32\n"
        )
        with running_deployment(
            (str(config), *ARGUMENTS, "--engine-command", vllm_command),
            environ=clean_environ() | {"PDLAUNCH_ENGINE_API_KEY": OTHER_ROUTER},
            timeout_s=START_TIMEOUT_S,
        ) as deployment:
            yield deployment


@contextlib.contextmanager
def two_held_ports() -> Iterator[int]:
    """Yield a port that is held as ``held_port`` holds one, and the next one is too."""
    while True:
        with held_port() as port, socket.socket() as next_one:
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            next_one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield port
            return


def pairs(url: str) -> set[tuple[str, str]]:
    _, status = Api(url).get_object("/pdlaunch/status")
    return {(pair["prefill"], pair["decode"]) for pair in status["pairs"]}


def num_answers(url: str, name: str) -> float:
    return admin_api(url).engine(name).metrics()[ANSWERS]


@needs_vllm_router
def test_vllm_router_answers_with_the_same_tokens(launch: Deployment, tmp_path: Path) -> None:
    urls = {engine["name"]: engine["url"] for engine in engines_of(admin_api(launch.url))}
    with running_vllm_router(
        prefill=[urls[name] for name in PREFILLS],
        decode=urls["decode-0"],
        api_key=OTHER_ROUTER,
        log_file=tmp_path / "log",
    ) as theirs:
        before = {name: num_answers(launch.url, name) for name in PREFILLS}
        for seed, stream in enumerate((False, True, False, True), start=120):
            fields: dict[str, Any] = {
                "model": "smollm2",
                "prompt": prompt_of(seed),
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": stream,
            }
            num_bytes = bytes_read(launch.url)
            told = answered(theirs, "completions", fields)
            assert bytes_read(launch.url) > num_bytes
            assert told[0] == complete(launch.url, prompt_of(seed), NUM_TOKENS)
        assert all(num_answers(launch.url, name) > before[name] for name in PREFILLS)


def test_prefill_engines_that_die_are_replaced_and_decode_goes_on(launch: Deployment) -> None:
    """One loses its vLLM, the other one its sidecar, while decode streams what both computed."""
    patient = Api(launch.url, timeout_s=600)
    prompt = prompt_of(140)
    expected = complete(patient, prompt, LONG)
    sidecars = launch.processes()
    decode = engine_of(sidecars["decode-0"])
    orphan = engine_of(sidecars["prefill-1"])
    with streamed(launch.url, prompt, LONG) as tokens:
        first = next(tokens)
        engine_of(sidecars["prefill-0"]).kill()
        sidecars["prefill-1"].kill()
        assert [first, *tokens] == expected
    # Decode computes prompts itself meanwhile.
    assert complete(launch.url, prompt_of(141), NUM_TOKENS)
    await_true(lambda: not lives(orphan), "a sidecar takes its engine with it", 60)

    for name in PREFILLS:
        await_true(partial(is_ready, launch.url, name), f"{name} is back", 600)

    await_true(lambda: len(pairs(launch.url)) == 2, "both pairs are proven again", 120)
    assert launch.processes()["decode-0"].pid == sidecars["decode-0"].pid
    assert engine_of(launch.processes()["decode-0"]).pid == decode.pid
    before = {name: num_answers(launch.url, name) for name in PREFILLS}
    alone = admin_api(launch.url).engine("prefill-0")
    for seed in range(142, 146):
        num_bytes = bytes_read(launch.url)
        told = complete(launch.url, prompt_of(seed), NUM_TOKENS)
        assert bytes_read(launch.url) > num_bytes
        assert told == complete(alone, prompt_of(seed), NUM_TOKENS, model="smollm2")
    assert all(num_answers(launch.url, name) > before[name] for name in PREFILLS)
    assert complete(patient, prompt, LONG) == expected


def is_ready(url: str, name: str) -> bool:
    return states(url).get(name) == "ready"
