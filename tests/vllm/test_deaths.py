"""Processes of a pair of vLLM that are killed or stand still: the core that computes, the sidecar,
and last the supervisor of it all.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator

import psutil
import pytest
from openai import APIError, OpenAI

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete, streamed
from tests.e2e.waiting import await_true
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import core_of, engine_of, worker_of
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of, states

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


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    return True


def await_healed(launch: Deployment, name: str, dead: list[psutil.Process], seed: int) -> None:
    """Wait until an engine is back in other processes and its pair moves KV blocks."""
    await_true(lambda: states(launch.url).get(name) != "ready", "its death is seen", 120)
    await_true(lambda: all(map(is_gone, dead)), "all of it is gone", 120)
    await_true(lambda: states(launch.url).get(name) == "ready", f"{name} is back", 600)

    def pairs() -> list[object]:
        found: list[object] = Api(launch.url).get_object("/pdlaunch/status")[1]["pairs"]
        return found

    await_true(lambda: bool(pairs()), "its pair is proven", 120)
    num_bytes = bytes_read(launch.url)
    prompt = prompt_of(seed)
    told = complete(launch.url, prompt, NUM_TOKENS)
    assert bytes_read(launch.url) > num_bytes
    assert complete(launch.url, prompt, NUM_TOKENS) == told


def test_an_idle_engine_whose_core_stands_still_is_restarted(launch: Deployment) -> None:
    """Nobody asks for anything, and vLLM says that it is healthy."""
    sidecar = launch.processes()["decode-0"]
    dead = family(engine_of(sidecar))
    core_of(sidecar).suspend()
    await_true(lambda: is_gone(sidecar), "it is found", 4 * HANG_TIMEOUT_S)
    said = f"has computed nothing for {HANG_TIMEOUT_S} s"
    await_true(lambda: said in launch.output(), "the launch says so", 60)
    await_healed(launch, "decode-0", dead, seed=301)


@pytest.mark.parametrize(
    ("name", "victim"),
    [("decode-0", core_of), ("prefill-0", core_of), ("decode-0", worker_of)],
    ids=["core of decode", "core of prefill", "worker of decode"],
)
def test_what_computes_is_killed_under_streams(
    launch: Deployment, name: str, victim: Callable[[psutil.Process], psutil.Process]
) -> None:
    """The server of the engine lives on for a moment, and answers for a core that is gone."""
    prompt = prompt_of(310)
    expected = complete(launch.url, prompt, LONG)
    client = OpenAI(base_url=launch.url + "/v1", api_key="none", max_retries=0)
    seeded = client.completions.create(
        model="smollm2", prompt=prompt_of(311), max_tokens=200, seed=5, stream=True
    )
    next(iter(seeded))
    lost = Api(launch.url).metrics()["pdlaunch_router_lost_streams_total"]
    sidecar = launch.processes()[name]
    dead = family(engine_of(sidecar))
    with streamed(launch.url, prompt, LONG) as tokens:
        first = next(tokens)
        victim(sidecar).kill()
        assert [first, *tokens] == expected
    if name == "decode-0":
        with pytest.raises(APIError, match="seed"):
            list(seeded)
        assert Api(launch.url).metrics()["pdlaunch_router_lost_streams_total"] == lost + 1
    else:
        # What decode has begun does not need prefill any more.
        assert list(seeded)[-1].choices[0].finish_reason
    await_healed(launch, name, dead, seed=312)


def test_a_sidecar_that_is_killed_takes_its_engine_with_it_under_a_stream(
    launch: Deployment,
) -> None:
    prompt = prompt_of(320)
    expected = complete(launch.url, prompt, LONG)
    sidecar = launch.processes()["decode-0"]
    dead = family(sidecar)
    with streamed(launch.url, prompt, LONG) as tokens:
        first = next(tokens)
        sidecar.kill()
        assert [first, *tokens] == expected
    await_healed(launch, "decode-0", dead, seed=321)


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
    await_true(lambda: all(map(is_gone, everybody)), "nothing is left", 60)
