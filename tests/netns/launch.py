"""Starts launches over the hosts of a test, and asks their router from the host that it is on."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import DEMO_ARGUMENTS, clean_environ
from tests.e2e.tiny_models import make_tiny_model
from tests.launch.sidecar.fake_vllm import answer_of
from tests.launch.sidecar.program import write_command
from tests.netns.hosts import Host, Network, signal_inner

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 240.0
PORT = 8000
_AGREEMENT = """
import json, sys
from tests.e2e.agreement import differences
print(json.dumps(differences(sys.argv[1])))
"""
_ALONE = """
import json, sys
from pdlaunch.launch.client.api import admin_api
engine = admin_api(sys.argv[1])
engine.url += f"/pdlaunch/engines/{sys.argv[2]}"
print(json.dumps([engine.post("/v1/completions", body)[1] for body in json.load(sys.stdin)]))
"""
PROMPT = list(range(40, 140))
QUESTION = {"model": "llama", "prompt": PROMPT, "max_tokens": 5, "return_token_ids": True}
ANSWER = answer_of(PROMPT, 5)
STAND_IN = "tests.launch.sidecar.program"
"""The module that stands for vLLM, what it is asked, and what it answers."""
JOIN = "/tmp/join.json"
LOGS = "/tmp/logs"


@dataclass
class FarLaunch:
    network: Network
    here: Host
    serve: subprocess.Popen[bytes]
    stack: contextlib.ExitStack
    allow: Sequence[str] = ()
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{PORT}"

    def start_agent(self, name: str) -> None:
        words = ["agent", "--join", JOIN, "--name", name]
        words += [word for each in self.allow for word in ("--allow-executable", each)]
        self.agents[name] = self.stack.enter_context(pdlaunch(self.network[name], "agent", *words))

    def differences(self) -> list[str]:
        words = [sys.executable, "-c", _AGREEMENT, self.url]
        found: list[str] = json.loads(self.here.run(*words, timeout_s=240))
        return found

    def ask(self, *questions: Mapping[str, Any]) -> list[Any]:
        """The answers of the router to questions that are asked at the same time: JSON, or a text
        that says what went wrong.
        """

        def ask(question: Mapping[str, Any]) -> Any:
            words = ("--json", json.dumps(question))
            found = self.here.get(f"{self.url}/v1/completions", *words, timeout_s=ANSWER_TIMEOUT_S)
            status, answer = found
            return answer if status == 200 or answer == "stuck" else f"{status} {answer}"

        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(ask, questions))

    def assert_answered(self) -> None:
        (answer,) = self.ask(QUESTION)
        assert isinstance(answer, dict), answer
        assert answer["choices"][0]["token_ids"] == ANSWER

    def ask_alone(self, engine: str, *questions: Mapping[str, Any]) -> list[Any]:
        """The answers of one engine, which computes all by itself."""
        result = subprocess.run(
            self.here.command(sys.executable, "-c", _ALONE, self.url, engine),
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        answers: list[Any] = json.loads(result.stdout)
        return answers

    def get(self, path: str) -> str:
        return str(self.here.get(self.url + path)[1])

    def status(self) -> Any:
        return self.here.get(f"{self.url}/pdlaunch/status")[1]

    def log(self, name: str) -> str:
        return self.here.file(f"{LOGS}/{name}").read_text(errors="replace")

    def output(self) -> str:
        return "\n".join(
            f"--- {host.name} {name}\n{host.file(f'/tmp/{name}.out').read_text(errors='replace')}"
            for host in self.network.hosts
            for name in ("serve", "agent")
            if host.file(f"/tmp/{name}.out").exists()
        )


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that all hosts share, as they do not share /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="pdlaunch-test-") as name:
        yield Path(name)


def stand_in(folder: Path, **heads: int) -> dict[str, Any]:
    """Settings of a launch with a stand-in for vLLM, whose files are in a shared folder."""
    return {
        "model": str(make_tiny_model("llama", folder, **heads)),
        "engine": "vllm",
        "engine_command": str(write_command(folder)),
        "kv_transfer": {"trusted_network": True},
        "env": {"FAKE_VLLM_FOLDER": str(folder)},
    }


@contextlib.contextmanager
def far_launch(
    network: Network,
    config: Mapping[str, Any],
    agents: Sequence[str],
    *,
    allow: Sequence[str] = (),
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[FarLaunch]:
    """Run a launch of the demo model on host a, whose prompts go through pairs, with agents on
    other hosts, until it is ready. ``allow``: executables that the agents allow.
    """
    host = network["a"]
    whole = {
        "control_address": host.address,
        "placement": "hosts",
        "join_file": JOIN,
        "log_dir": LOGS,
        **config,
    }
    host.file("/tmp/launch.yaml").write_text(json.dumps(whole))
    # A launch that was killed has left its own, which agents must not be given; `serve` removes it
    # too, but later than this looks for it.
    host.file(JOIN).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        words = ("serve", "/tmp/launch.yaml", *DEMO_ARGUMENTS, "--port", str(PORT))
        serve = stack.enter_context(pdlaunch(host, "serve", *words))
        launch = FarLaunch(network, host, serve, stack, allow)
        try:
            wait_for(host.file(JOIN).exists, launch, "no join file")
            ticket = host.file(JOIN).read_bytes()
            for name in agents:
                file = network[name].file(JOIN)
                file.touch(0o600)
                file.write_bytes(ticket)
                launch.start_agent(name)
            wait_for(lambda: is_healthy(launch), launch, "not ready", timeout_s)
            yield launch
        except BaseException:
            sys.stderr.write(launch.output())
            raise
        finally:
            signal_inner(serve, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                serve.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def pdlaunch(
    host: Host, name: str, *words: str, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (
        host.file(f"/tmp/{name}.out").open("wb") as output,
        host.running(
            *(sys.executable, "-P", "-m", "pdlaunch", *words),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environ or clean_environ(),
        ) as process,
    ):
        yield process


def is_healthy(launch: FarLaunch) -> bool:
    assert launch.serve.poll() is None, launch.output()
    return launch.here.get(f"{launch.url}/health")[0] == 200


def wait_for(done: Any, launch: FarLaunch, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    end_at = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end_at, f"{what}\n{launch.output()}"
        assert launch.serve.poll() is None, launch.output()
        time.sleep(0.1)
