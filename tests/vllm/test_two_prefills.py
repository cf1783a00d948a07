"""Two prefill engines and one decode engine of vLLM behind vllm-router."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.deployment import Deployment, held_port, running_deployment
from tests.e2e.agreement import engines_of
from tests.e2e.api import complete, greedy_body
from tests.e2e.conftest import clean_environ
from tests.e2e.lone_router import needs_vllm_router, running_vllm_router
from tests.e2e.test_doors import answered
from tests.vllm.conftest import ARGUMENTS, START_TIMEOUT_S
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of

pytestmark = pytest.mark.vllm_long

OTHER_ROUTER = "of-another-router"
PREFILLS = ("prefill-0", "prefill-1")
ANSWERS = "vllm:request_success_total"


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
            body = greedy_body(prompt_of(seed), NUM_TOKENS) | {"model": "smollm2"}
            num_bytes = bytes_read(launch.url)
            told = answered(theirs, "completions", body | {"stream": stream})
            assert bytes_read(launch.url) > num_bytes
            assert told[0] == complete(launch.url, prompt_of(seed), NUM_TOKENS)
        assert all(num_answers(launch.url, name) > before[name] for name in PREFILLS)
