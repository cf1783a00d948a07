"""A core of vLLM that stands still while nobody asks, and a supervisor that is killed."""

import contextlib
import http.client
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.api import streamed
from tests.e2e.client import Deployment
from tests.e2e.faults import lives
from tests.e2e.waiting import await_true
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import core_of, engine_of
from tests.vllm.test_pair import await_healed, prompt_of

pytestmark = pytest.mark.vllm_long

HANG_TIMEOUT_S = 45
"""Longer than any step on a busy machine."""
LONG = 60
"""Tokens of a stream during which processes are killed."""


@pytest.fixture(scope="module")
def launch(vllm_command: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = {"dtype": "float32", "hang_timeout_s": HANG_TIMEOUT_S}
    with running_engines(tmp_path_factory.mktemp("deaths"), vllm_command, settings) as deployment:
        yield deployment


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def test_an_idle_engine_whose_core_stands_still_is_restarted(launch: Deployment) -> None:
    """Nobody asks for anything, and vLLM says that it is healthy."""
    sidecar = launch.processes()["decode-0"]
    dead = family(engine_of(sidecar))
    core_of(sidecar).suspend()
    await_true(lambda: not lives(sidecar), "it is found", 4 * HANG_TIMEOUT_S)
    said = f"has computed nothing for {HANG_TIMEOUT_S} s"
    await_true(lambda: said in launch.output(), "the launch says so", 60)
    await_healed(launch.url, "decode-0")
    assert not any(map(lives, dead))


def test_nothing_is_left_of_a_launch_whose_supervisor_is_killed(launch: Deployment) -> None:
    """The last test: the stream breaks, as its router goes too."""
    everybody = family(psutil.Process(launch.process.pid))
    assert len(everybody) >= 9, "supervisor, router; twice sidecar, server, core, worker"
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        streamed(launch.url, prompt_of(330), LONG) as tokens,
    ):
        next(tokens)
        launch.process.kill()
        list(tokens)
    await_true(lambda: not any(map(lives, everybody)), "nothing is left")
