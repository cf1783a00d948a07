"""Start, stop and death of processes, with real processes and a tiny model."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pdlaunch.machine.network import probe_port
from tests.e2e.agreement import engines_of
from tests.e2e.api import await_ready, clients, complete, requests_in_flight, states, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import default_environ, launched
from tests.e2e.faults import lives, paused, tracebacks
from tests.e2e.tiny_models import greedy
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 100))
LAUNCH = "--stop-on-stdin-eof"
"""An argument of only the launch that a command starts."""


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[int]:
    return greedy(llama, [PROMPT], 16)[0]


@pytest.fixture(scope="class")
def deployment(llama: Path) -> Iterator[Deployment]:
    """One launch for each test, or for all tests of a class."""
    with launched(llama, "--drain-timeout", "120") as deployment:
        yield deployment


def test_two_launches_at_once_end_each_for_itself(
    llama: Path, expected: list[int], deployment: Deployment
) -> None:
    """SIGTERM ends every process of one launch with code 0. The other launch's supervisor is
    killed, and no process outlives it.
    """
    with launched(llama, environ=default_environ()) as other:
        assert complete(other.url, PROMPT, 16) == expected
        assert complete(deployment.url, PROMPT, 16) == expected
        children = list(deployment.processes().values())
        assert len(children) == 5
        assert deployment.stop() == 0
        assert not any(map(lives, children))
        assert complete(other.url, PROMPT, 16) == expected
        children = list(other.processes().values())
        assert len(children) == 5
        other.process.kill()
        _, alive = psutil.wait_procs(children, timeout=180)
        assert not alive


def engine_urls(deployment: Deployment) -> set[str]:
    return {engine["url"] for engine in engines_of(Api(deployment.url))}


def is_taken(url: str) -> bool:
    """True if no other process can listen at this URL."""
    parts = urlsplit(url)
    return "busy" in probe_port(parts.hostname or "", parts.port or 0)


class TestRestarts:
    """The tests run one after another in one launch; the last test ends it."""

    @pytest.mark.parametrize("name", ["prefill-0/rank-0", "decode-0", "router"])
    def test_a_killed_process_comes_back_and_its_peers_find_it(
        self, deployment: Deployment, expected: list[int], name: str
    ) -> None:
        assert complete(deployment.url, PROMPT, 16) == expected
        before, urls = deployment.processes(), engine_urls(deployment)
        before[name].kill()
        if name == "router":
            # A request that arrives without a router waits for the next router.
            before[name].wait()
            assert complete(deployment.url, PROMPT, 16) == expected
        await_true(
            lambda: deployment.processes().get(name, before[name]).pid != before[name].pid,
            f"restart of {name}",
        )

        api, body = Api(deployment.url), {"prompt": PROMPT, "max_tokens": 1}
        await_true(
            lambda: api.post("/v1/completions", body)[0] == 200, "an answer after the restart"
        )
        assert complete(deployment.url, PROMPT, 16) == expected
        # No other process took the port of the dead server: it would have got prompts.
        await_ready(deployment.url)
        left = urls - engine_urls(deployment)
        assert len(left) == (name == "decode-0")
        assert all(is_taken(url) for url in left)
        others = [other for other in before if other != name]
        assert {other: deployment.processes()[other].pid for other in others} == {
            other: before[other].pid for other in others
        }
        assert tracebacks(deployment) == {}

    @pytest.mark.parametrize(
        ("name", "verbs"),
        [("decode-0", ["restart"]), ("prefill-0/rank-0", ["drain", "restart", "undrain"])],
    )
    def test_a_restart_loses_no_request(
        self, deployment: Deployment, expected: list[int], name: str, verbs: list[str]
    ) -> None:
        engine = name.partition("/")[0]
        # A new router learns of the engines one after another.
        await_ready(deployment.url)
        before = deployment.processes()

        def ask(*_: int) -> None:
            assert complete(deployment.url, PROMPT, 16) == expected

        with (
            clients(2, ask),
            ThreadPoolExecutor(1) as pool,
            streamed(deployment.url, PROMPT, 400) as token_ids,
        ):
            found = list(islice(token_ids, 5))
            restart = pool.submit(commands, verbs, name, "--url", deployment.url)
            found += token_ids
            result = restart.result()
        assert f"{engine} serves again\n" in result
        assert set(states(deployment.url).values()) == {"ready"}
        assert (len(found), found[:16]) == (400, expected)
        assert complete(deployment.url, PROMPT, 16) == expected
        after = deployment.processes()
        assert {each for each in before if after[each].pid != before[each].pid} == {
            engine,
            f"{engine}/rank-0",
        }
        assert tracebacks(deployment) == {}

    def test_requests_during_a_drain_get_503_and_running_ones_finish(
        self, deployment: Deployment, expected: list[int]
    ) -> None:
        # A request for one token needs no decode engine, so only the running request waits for it.
        one_token = {"prompt": PROMPT, "max_tokens": 1}
        with ThreadPoolExecutor(1) as pool:
            with paused(deployment.processes()["decode-0/rank-0"]):
                running = pool.submit(complete, deployment.url, PROMPT, 16)
                await_true(
                    lambda: requests_in_flight(deployment.url) == 1, "the request is running"
                )
                # Slurm and systemd signal every process of a launch; only the supervisor reacts.
                for process in (deployment.process, *deployment.processes().values()):
                    process.send_signal(signal.SIGTERM)
                await_true(
                    lambda: Api(deployment.url).post("/v1/completions", one_token)[0] == 503,
                    "refusal of new requests",
                )
                await_true(
                    lambda: "draining: 1 request left" in deployment.output(), "the drain is told"
                )
                assert not running.done()
            assert running.result() == expected
        assert deployment.process.wait(180) == 0


def commands(verbs: list[str], *arguments: str) -> str:
    """Run commands one after another; return their output."""
    results = [command(verb, *arguments) for verb in verbs]
    assert [result.returncode for result in results] == [0] * len(verbs), results
    return "".join(result.stdout for result in results)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pdlaunch", *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=300, env=default_environ(), check=False
    )


def test_a_busy_port_is_named_before_anything_starts(llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = command("serve", "--model", str(llama), "--port", str(port))
    assert result.returncode == 1
    assert f"port {port} of 127.0.0.1 for the router cannot be used: it is busy" in result.stderr


def test_a_deployment_ends_with_the_benchmark_that_started_it(llama: Path) -> None:
    """The benchmark is killed, so it cannot stop the deployment itself."""
    arguments = ("--both", "1", "--model", str(llama), "--kv-cache-memory", "16MiB")
    lengths = ("--max-token-id", "200", "--input-tokens", "60", "--output-tokens", "60")
    with starter("bench", "serve", *arguments, *lengths, "--num-requests", "100000") as bench:
        launch = child_of(bench.pid, LAUNCH)
        command = launch.cmdline()
        url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        await_true(lambda: requests_in_flight(url) > 0, "load")
        children = [launch, *launch.children(recursive=True)]
        assert len(children) >= 4
        bench.kill()
        bench.communicate(timeout=300)
        _, alive = psutil.wait_procs(children, timeout=180)
    assert not alive


def test_a_deployment_that_still_starts_ends_with_the_benchmark(
    llama: Path, tmp_path: Path
) -> None:
    """The command gets SIGTERM, and waits for the end of its deployment."""
    logs = tmp_path / "logs"
    arguments = ("--model", str(llama), "--kv-cache-memory", "16MiB", "--log-dir", str(logs))
    with starter("bench", "serve", *arguments) as bench:
        launch = child_of(bench.pid, LAUNCH)
        child_of(launch.pid, "--name")
        children = [launch, *launch.children(recursive=True)]
        bench.send_signal(signal.SIGTERM)
        _, errors = bench.communicate(timeout=300)
        assert (bench.returncode, errors) == (143, "error: interrupted\n")
    assert not any(map(lives, children))
    assert list(logs.iterdir())


@contextmanager
def starter(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pdlaunch", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=default_environ()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def child_of(pid: int, argument: str) -> psutil.Process:
    """Await a child with this argument. Other children may come and go."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        for child in psutil.Process(pid).children():
            with suppress(psutil.NoSuchProcess):
                found.extend([child] if argument in child.cmdline() else [])
        return bool(found)

    await_true(is_there, f"a process with {argument}")
    return found[0]
