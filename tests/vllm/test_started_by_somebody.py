"""Engines of vLLM that nobody of pdlaunch started, with the stock connector and its mistakes:
``pdlaunch doctor`` and ``pdlaunch router`` in front of them.

The tests run in the order of the file: the first ones look at engines that nobody has repaired.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.config.model_files.find import resolve_model
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import held_port
from pdlaunch.launch.sidecar.engine import die_with_thread
from tests.e2e.api import complete
from tests.e2e.client import Api, admin_api
from tests.e2e.conftest import clean_environ
from tests.e2e.lone_router import running_router
from tests.e2e.waiting import await_true
from tests.vllm.conftest import START_TIMEOUT_S
from tests.vllm.kv_memory import core_of
from tests.vllm.test_pair import NUM_TOKENS, assert_pulled, bytes_read, prompt_of, states

pytestmark = pytest.mark.vllm_long

MODEL = "smollm2"
TRANSFER = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"kv_lease_duration": 20},
}


@dataclass
class Server:
    command: tuple[str, ...]
    environ: dict[str, str]
    url: str
    log_file: Path

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_thread,
            )

    def kill(self) -> None:
        """Kill it with all of its processes, as a node that is gone takes them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log_file.read_text()[-4000:]
        try:
            return Api(self.url, timeout_s=5).get("/health")[0] == 200
        except PdlaunchError:
            return False


def new_server(
    vllm_command: str, folder: Path, name: str, port: int, side_channel: tuple[str, int]
) -> Server:
    command = (
        *(vllm_command, "serve", str(resolve_model(MODEL).cache_dir)),
        *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "512"),
        "--enforce-eager",
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-transfer-config", json.dumps(TRANSFER)),
    )
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel[0],
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel[1]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "UCX_MODULES": "^ib",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    server = Server(command, clean_environ() | own, f"http://127.0.0.1:{port}", folder / name)
    server.start()
    return server


@dataclass
class Somebodys:
    prefill: Server
    decode: Server

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--prefill", self.prefill.url, "--decode", self.decode.url)


@pytest.fixture(scope="module")
def engines(vllm_command: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Somebodys]:
    """Prefill's side channel listens everywhere, both run in dev mode, and their answers do not
    tell what was cached.
    """
    folder = tmp_path_factory.mktemp("somebodys")
    with contextlib.ExitStack() as stack:
        servers = []
        port = stack.enter_context(held_port())
        for name, side_channel in (
            ("prefill", ("0.0.0.0", port)),
            ("decode", ("127.0.0.1", stack.enter_context(held_port()))),
        ):
            own_port = stack.enter_context(held_port())
            server = new_server(vllm_command, folder, name, own_port, side_channel)
            stack.callback(server.kill)
            servers.append(server)
        for server in servers:
            await_true(server.is_healthy, "it is healthy", START_TIMEOUT_S)
        yield Somebodys(*servers)


@pytest.fixture(scope="module")
def router(engines: Somebodys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_router(
        ("--engine", "vllm", "--dtype", "float32", *engines.flags),
        clean_environ(),
        tmp_path_factory.mktemp("router") / "log",
    ) as url:
        yield url


def doctor(engines: Somebodys, *flags: str) -> tuple[int, dict[str, list[str]]]:
    """Return its exit code, and what it found by rule."""
    arguments = ["doctor", *engines.flags, "--exact", "--format", "json", *flags]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.stdout, result.output
    found: dict[str, list[str]] = {}
    for item in json.loads(result.stdout)["findings"]:
        found.setdefault(item["rule"], []).append(f"{item['where']}: {item['message']}")
    return result.exit_code, found


def ask_directly(server: Server, seed: int, **fields: Any) -> list[int]:
    return complete(Api(server.url), prompt_of(seed), NUM_TOKENS, model=MODEL, **fields)


def test_a_prefill_engine_that_is_never_used(engines: Somebodys) -> None:
    """As behind a router that knows nothing of P/D: decode answers it all."""
    ask_directly(engines.decode, 200)
    code, found = doctor(engines, "--no-canary")
    assert code == 0
    (unused,) = found["PD655"]
    assert engines.decode.url in unused
    assert "0 KV bytes read" in unused
    assert doctor(engines, "--no-canary", "--strict")[0] == 1


def test_a_router_that_leaves_max_completion_tokens_to_prefill(engines: Somebodys) -> None:
    """vLLM takes it over max_tokens: the prefill leg makes the whole answer."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count to ten."}],
        "max_tokens": 1,
        "ignore_eos": True,
    }
    assert "PD664" not in doctor(engines, "--no-canary")[1]
    prefill = Api(engines.prefill.url)
    for _ in range(10):
        status, answer = prefill.post("/v1/chat/completions", body | {"max_completion_tokens": 12})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 12)
    (found,) = doctor(engines, "--no-canary")[1]["PD664"]
    assert engines.prefill.url in found
    assert "of 12.0 tokens on average" in found


def test_a_side_channel_at_every_address_and_dev_mode(engines: Somebodys) -> None:
    code, found = doctor(engines)
    assert code == 1
    (wrong,) = found["PD661"]
    assert "to dial 0.0.0.0" in wrong
    assert len(found["PD658"]) == 2
    assert "PD654" not in found
    assert any(
        "a canary moved" in text and "--enable-prompt-tokens-details" in text
        for text in found["PD660"]
    )


def test_engines_fall_asleep_and_wake_up(engines: Somebodys, router: str) -> None:
    """vLLM's CPU build gives no memory back; it stops to schedule, which is what can be seen."""
    admin = admin_api(router)
    status, answer = admin.post("/sleep?engine=prefill-0", {})
    assert (status, answer["engines"][0]["is_sleeping"]) == (200, True)
    assert json.loads(Api(engines.prefill.url).get("/is_sleeping")[1]) == {"is_sleeping": True}
    assert states(router)["prefill-0"] == "sleeping"
    # Decode serves alone meanwhile: nothing waits for the one that sleeps.
    num_bytes = bytes_read(router)
    told = complete(router, prompt_of(220), NUM_TOKENS)
    assert bytes_read(router) == num_bytes
    status, answer = admin.post("/wake_up?engine=prefill-0", {})
    assert (status, answer["engines"][0]["is_sleeping"]) == (200, False)
    await_true(lambda: states(router)["prefill-0"] == "ready", "it is awake and proven", 60)
    assert told == ask_directly(engines.prefill, 220)
    assert complete(router, prompt_of(221), NUM_TOKENS)
    assert bytes_read(router) > num_bytes


def test_a_peer_that_is_replaced_heals_without_a_restart_of_others(
    engines: Somebodys, router: str
) -> None:
    """Prefill dies before decode has read a prompt's blocks, so decode computes the prompt. Its
    answer does not say so: the path is called ``unchecked``.
    """
    _, status = Api(router).get_object("/pdlaunch/status")
    assert [pair["path"] for pair in status["pairs"]] == ["canary, unchecked"]
    assert Api(router).metrics()["pdlaunch_router_canaries_total"] >= 1
    prompt = prompt_of(230)
    expected = complete(router, prompt, NUM_TOKENS)
    alone = ask_directly(engines.prefill, 229)
    decode = psutil.Process(engines.decode.process.pid)
    told: list[list[int]] = []
    client = threading.Thread(
        target=lambda: told.append(complete(router, prompt_of(229), NUM_TOKENS))
    )
    core = core_of(decode)
    core.suspend()
    try:
        client.start()
        await_true(lambda: load(router, "decode-0") > 0, "decode is asked", 60)
        engines.prefill.kill()
    finally:
        core.resume()
    client.join(120)
    assert told == [alone]
    # Decode computes prompts itself.
    assert complete(router, prompt_of(231), NUM_TOKENS)
    engines.prefill.start()
    await_true(engines.prefill.is_healthy, "the next one is healthy", START_TIMEOUT_S)
    await_true(lambda: states(router)["prefill-0"] == "ready", "its pair is proven", 120)
    assert_pulled(router, Api(engines.prefill.url), 232)
    assert decode.is_running()
    assert complete(router, prompt, NUM_TOKENS) == expected


def load(router: str, name: str) -> int:
    _, status = Api(router).get_object("/pdlaunch/status")
    return next(int(each["load"]) for each in status["engines"] if each["name"] == name)
