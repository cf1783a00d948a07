"""The engines of a launch change while streams run. Every token is right, no stream is lost, and
removed engines leave nothing behind.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdlaunch.launch.client.api import own_launches
from tests.command_line import invoke
from tests.e2e.agreement import engines_of
from tests.e2e.api import await_answers, clients, states, streamed
from tests.e2e.client import Deployment, admin_api
from tests.e2e.conftest import default_environ, launched
from tests.e2e.faults import fault_variables
from tests.e2e.tiny_models import greedy, make_prompts
from tests.e2e.waiting import await_true

NUM_TOKENS = 48
NUM_STREAMS = 2
PAUSE_S = 0.2
"""Pause between two streams, so that starting engines get CPU time."""


def streams(
    url: str, prompts: list[list[int]], expected: list[list[int]], pause_s: float = PAUSE_S
) -> Callable[[int, int], None]:
    """Stream the answers to prompts in turn, and compare each with the model's own."""

    def stream(client: int, number: int) -> None:
        place = (client + number) % len(prompts)
        with streamed(url, prompts[place], len(expected[place])) as tokens:
            assert list(tokens) == expected[place]
        time.sleep(pause_s)

    return stream


def run(*arguments: str, exit_code: int = 0) -> str:
    result = invoke(arguments, env={"NO_COLOR": "1", "COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


def await_work(deployment: Deployment, name: str) -> None:
    api = admin_api(deployment.url).engine(name)
    await_true(
        lambda: api.metrics().get("pdlaunch_sampled_tokens_total", 0) > 0, f"{name} has worked"
    )


def assert_gone(deployment: Deployment, name: str) -> None:
    """Check that no process, socket or file of an engine is left."""
    assert name not in {process.partition("/")[0] for process in deployment.processes()}
    (launch,) = own_launches(deployment.url)
    assert [path.name for path in launch.run_dir.iterdir() if name in path.name] == []
    assert name not in {engine["name"] for engine in engines_of(admin_api(deployment.url))}


def test_engines_come_turn_and_go_while_streams_run(llama: Path) -> None:
    prompts = make_prompts(5, range(20, 83, 7))
    expected = greedy(llama, prompts, NUM_TOKENS)
    with launched(llama) as deployment:
        url = ("--url", deployment.url)
        with clients(NUM_STREAMS, streams(deployment.url, prompts, expected)) as num_answers:
            planned = run("scale", "prefill=2", "--dry-run", *url)
            assert "prefill-1" in planned
            assert "The launch would be 2 prefill, 1 decode." in planned
            assert states(deployment.url) == {"decode-0": "ready", "prefill-0": "ready"}

            assert "The launch is 2 prefill, 1 decode." in run("scale", "prefill=2", *url)
            await_work(deployment, "prefill-1")

            assert "nothing runs there" in run("drain", "prefill-0", *url)
            assert states(deployment.url)["prefill-0"] == "draining"
            run("undrain", "prefill-0", *url)

            run("role", "prefill-1", "decode", *url)
            assert states(deployment.url) == {
                "decode-0": "ready",
                "decode-1": "ready",
                "prefill-0": "ready",
            }
            assert_gone(deployment, "prefill-1")
            await_work(deployment, "decode-1")

            run("scale", "decode=1", "--drain-timeout", "0", *url)
            assert_gone(deployment, "decode-1")
            await_answers(num_answers)
        _, status = admin_api(deployment.url).get_object("/pdlaunch/status")
        assert (status["errors"], status["gone"]) == (0, []), json.dumps(status["events"])


@pytest.mark.e2e_long
def test_the_autopilot_turns_a_prefill_engine_into_one_of_decode(llama: Path) -> None:
    """Short prompts with long answers fill the batch of the only decode engine. Then the mix turns
    to long prompts, and back.
    """
    mixes = []
    for size, num_tokens in ((8, 200), (1500, 4)):
        prompts = make_prompts(size, [size] * 7)
        mixes.append((prompts, greedy(llama, prompts, num_tokens)))
    wanted = ["decode", "decode", "prefill"]
    flags = ("--prefill", "2", "--autopilot", "on", "--max-num-seqs", "4")
    # Slow steps leave the cores to other tests.
    slow = fault_variables({"rate": 0, "lease_rate": 0, "chunk_rate": 0, "step_s": 0.03})
    with launched(llama, *flags, environ=default_environ() | slow) as deployment:

        def has_turned() -> bool:
            now = states(deployment.url)
            return sorted(name.partition("-")[0] for name in now if now[name] == "ready") == wanted

        def serve(number: int, until: Callable[[], bool]) -> None:
            with clients(8, streams(deployment.url, *mixes[number], pause_s=0.0)) as num_answers:
                await_true(until, lambda: run("status", "--url", deployment.url))
                await_answers(num_answers)

        serve(0, has_turned)
        serve(1, lambda: True)
        serve(0, has_turned)
        _, status = admin_api(deployment.url).get_object("/pdlaunch/status")
        assert status["errors"] == 0, json.dumps(status["events"])
        told = [each for each in status["events"] if each["text"].startswith("autopilot: ")]
        assert "requests run" in told[0]["text"]
