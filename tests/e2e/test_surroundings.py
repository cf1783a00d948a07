"""Launches with the default settings: routes, benchmarks, a stopped supervisor, lost folders."""

import json
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.kills import kill_and_wait
from pdlaunch.bench.serve import BenchOptions, bench_serve
from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from tests.command_line import invoke
from tests.e2e.api import complete_all, greedy_body, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import default_environ, launched
from tests.e2e.faults import paused
from tests.e2e.test_scale import run
from tests.e2e.tiny_models import VOCAB_SIZE, greedy, make_prompts
from tests.e2e.waiting import await_true


@pytest.fixture(scope="module")
def launch(llama: Path) -> Iterator[Deployment]:
    with launched(llama, "--max-num-batched-tokens", "64", environ=default_environ()) as launch:
        yield launch


def ask(url: str, prompt: list[int], **headers: str) -> tuple[str, list[int]]:
    """Return the route and the tokens of a greedy answer."""
    body = json.dumps(greedy_body(prompt, 8)).encode()
    headers |= {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.headers[ROUTE_HEADER], json.load(response)["choices"][0]["token_ids"]


def test_every_route_gives_the_tokens_of_the_model(launch: Deployment, llama: Path) -> None:
    prompts = make_prompts(3, range(20, 128, 9))
    expected = greedy(llama, prompts, 24)
    assert complete_all(launch.url, prompts, 24, concurrency=12) == expected
    route, tokens = ask(launch.url, prompts[0])
    assert "; kind=" in route
    assert tokens == expected[0][:8]
    route, tokens = ask(launch.url, prompts[1], **{ROUTE_HEADER: WANTS_PAIR})
    assert route.startswith("prefill-0")
    assert tokens == expected[1][:8]
    lines = Api(launch.url).get("/metrics")[1].splitlines()
    routed = [line for line in lines if line.startswith("pdlaunch_router_routes_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in routed) == len(prompts) + 2


async def test_a_launch_with_pairs_uses_them_by_default(launch: Deployment) -> None:
    options = BenchOptions(
        url=launch.url,
        output_tokens=4,
        concurrencies=(1, 4),
        num_requests=8,
        max_token_id=VOCAB_SIZE,
    )
    alone, several = rows = [run.row async for run in bench_serve(options, lambda _: None)]
    assert [(one.kind, one.share) for one in alone.routes] == [("pair", 1.0)]
    assert several.pair_share
    for row in rows:
        assert (row.num_requests, row.errors) == (8, [])
        assert row.ttft_ms_median > 0
        # On a busy machine, several tokens may arrive at the same time.
        gaps = (row.first_gap_ms_median, row.itl_ms_median, row.tpot_ms_median)
        assert all(gap is not None and gap >= 0 for gap in gaps)
    assert "routes of the last prompts: " in invoke(["status", "--url", launch.url]).stdout


def test_a_supervisor_that_wakes_up_late_restarts_nothing(launch: Deployment) -> None:
    before = {name: process.pid for name, process in launch.processes().items()}
    with paused(psutil.Process(launch.process.pid)):
        said = run("restart", "decode-0", "--url", launch.url, exit_code=1)
    assert "the supervisor has not answered within 10 s" in said
    await_true(lambda: "a command is dropped" in launch.output(), "the supervisor says so")
    # This command comes after the dropped one, so a restart would show by now.
    assert "nothing runs there" in run("drain", "prefill-0", "--url", launch.url)
    assert {name: process.pid for name, process in launch.processes().items()} == before


def test_a_launch_whose_folders_are_removed_answers_and_ends(llama: Path) -> None:
    prompt = list(range(40, 100))
    (expected,) = greedy(llama, [prompt], 400)
    folder = tempfile.TemporaryDirectory(suffix=30 * "x")
    environ = default_environ() | {"TMPDIR": folder.name}
    with folder, launched(llama, environ=environ) as launch:
        shutil.rmtree(launch.log_dir)
        said = f"{launch.log_dir}, the log folder, was removed"
        await_true(lambda: said in launch.output(), "the launch says so")
        assert launch.log_dir.is_dir()
        (own,) = Path(folder.name).glob("pdlaunch-run-*")
        with streamed(launch.url, prompt, 400) as tokens:
            found = [next(tokens)]
            for path in filter(Path.is_socket, list(own.iterdir())):
                path.unlink()  # as cleaners do that keep folders in use
            assert found + list(tokens) == expected
        assert launch.process.wait(120) == 1
        assert f"{own}, the folder of this launch, or its socket was removed" in launch.output()


def test_what_follows_goes_to_the_engine_that_reports_the_blocks(llama: Path) -> None:
    prompts, endings = make_prompts(11, [300] * 6), make_prompts(12, [6] * 6)
    answers = greedy(llama, prompts, 8)
    nexts = [a + b + c for a, b, c in zip(prompts, answers, endings, strict=True)]
    next_answers = greedy(llama, nexts, 8)
    with launched(llama, "--decode", "2", environ=default_environ()) as launch:
        holders = []
        for prompt, answer in zip(prompts, answers, strict=True):
            route, tokens = ask(launch.url, prompt)
            assert tokens == answer
            holders.append(route.partition(";")[0].rpartition("->")[2])
        assert {*holders} == {"decode-0", "decode-1"}
        # Only the first prompts: events of the last ones may not have arrived yet.
        for prompt, answer, holder in zip(nexts[:3], next_answers, holders, strict=False):
            route, tokens = ask(launch.url, prompt)
            assert route.partition(";")[0].rpartition("->")[2] == holder
            assert tokens == answer
        # A restarted engine has no blocks, and the router knows it.
        lost = holders[4]
        kill_and_wait(launch, f"{lost}/rank-0", signal.SIGKILL)
        route, tokens = ask(launch.url, nexts[4])
        assert tokens == next_answers[4]
        assert route.partition(";")[0] != lost
