"""Launches of ``engine: vllm`` with a fake executable: how supervisor, sidecars and router react
to its deaths, hangs and false reports. tests/vllm has the real vLLM.
"""

import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdlaunch.errors import StartupError
from pdlaunch.launch.client.api import command_launch, own_launches
from tests.command_line import invoke
from tests.e2e.api import complete, states
from tests.e2e.client import Api, Deployment, admin_api, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import lives, tracebacks
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true
from tests.launch.sidecar.fake_vllm import answer_of
from tests.launch.sidecar.program import replace_text, write_command

ROOT = Path(__file__).parents[2]
PROMPT = list(range(40, 140))


@contextmanager
def launched(
    folder: Path, model: Path, *flags: str, environ: Mapping[str, str] | None = None
) -> Iterator[Deployment]:
    """Files in ``folder`` control the fake engines (``tests.launch.sidecar.program``)."""
    command = write_command(folder)
    with running_deployment(
        ("--engine", "vllm", "--engine-command", str(command), "--model", str(model), *flags),
        environ=clean_environ() | {"FAKE_VLLM_FOLDER": str(folder)} | dict(environ or {}),
    ) as deployment:
        yield deployment


def started(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.started").read_text())


def pid_of(folder: Path, name: str) -> int:
    return int(started(folder, name)["pid"])


def say(folder: Path, name: str, value: object) -> None:
    """Change how the fake engines behave from now on."""
    replace_text(folder / name, json.dumps(value))


def is_back(deployment: Deployment, folder: Path, name: str, old_pid: int) -> bool:
    return pid_of(folder, name) != old_pid and states(deployment.url).get(name) == "ready"


def exists(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return lives(psutil.Process(pid))
    return False


def test_serves_heals_after_a_kill_and_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    environ = {
        "PDLAUNCH_HANG_TIMEOUT_S": "5",
        "PDLAUNCH_ENGINE_API_KEY": "of-the-launch",
        # Variables of the user's shell, meant for another vLLM.
        "VLLM_API_KEY": "of-the-shell",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    with launched(tmp_path, llama, environ=environ) as deployment:
        assert complete(deployment.url, PROMPT, 5, model=None) == answer_of(PROMPT, 5)
        _, status = Api(deployment.url).get_object("/pdlaunch/status")
        assert {(each["kind"], each["version"]) for each in status["engines"]} == {
            ("vllm", "0.32.0+cpu")
        }
        told = started(tmp_path, "decode-0")
        environment = told["environment"]
        assert not any("KEY" in name for name in environment if name.startswith("PDLAUNCH"))
        assert environment["VLLM_API_KEY"] == "of-the-launch"
        assert environment["VLLM_SERVER_DEV_MODE"] == "0"
        assert "of-the-launch" not in str(told["arguments"])
        run_dir = Path(environment["VLLM_RPC_BASE_PATH"])
        assert run_dir.stat().st_mode & 0o777 == 0o700
        pid = told["pid"]
        os.kill(pid, signal.SIGKILL)
        await_true(lambda: is_back(deployment, tmp_path, "decode-0", pid), "it is back")
        assert complete(deployment.url, PROMPT, 5, model=None) == answer_of(PROMPT, 5)

        # The engine has requests but makes no tokens.
        pid = pid_of(tmp_path, "prefill-0")
        say(tmp_path, "prefill-0.num_running", 1)
        await_true(lambda: pid_of(tmp_path, "prefill-0") != pid, "the hung one is killed")
        say(tmp_path, "prefill-0.num_running", 0)
        await_true(lambda: states(deployment.url).get("prefill-0") == "ready", "it is ready again")
        assert "has computed nothing for 5 s" in deployment.output()

        # If a sidecar dies, its engine dies too.
        pid = pid_of(tmp_path, "decode-0")
        deployment.processes()["decode-0"].kill()
        await_true(lambda: not exists(pid), "its engine is gone")
        await_true(lambda: is_back(deployment, tmp_path, "decode-0", pid), "both are back")
        assert tracebacks(deployment) == {}
        pids = [pid_of(tmp_path, name) for name in ("prefill-0", "decode-0")]
    assert not any(map(exists, pids))
    assert not run_dir.exists()


def test_engines_come_turn_and_go(tmp_path: Path, llama: Path) -> None:
    with launched(tmp_path, llama) as deployment:
        admin = admin_api(deployment.url)
        run_dir = own_launches(deployment.url)[0].run_dir
        assert command_launch(admin, "scale", replicas={"prefill": 2}).error == ""
        assert states(deployment.url).get("prefill-1") == "ready"
        # A new engine whose canary fails is removed again; the others keep serving.
        say(tmp_path, "prefill-2.has_connector", False)
        assert "no KV connector" in command_launch(admin, "scale", replicas={"prefill": 3}).error
        assert "prefill-2" not in deployment.processes()
        assert command_launch(admin, "role", engine="prefill-1", role="decode").error == ""
        assert states(deployment.url).get("decode-1") == "ready"
        assert complete(deployment.url, PROMPT, 5, model=None) == answer_of(PROMPT, 5)
        assert not list(run_dir.glob("prefill-[12].*"))
        pids = [pid_of(tmp_path, name) for name in ("prefill-1", "prefill-2")]
        assert not any(map(exists, pids))


@pytest.mark.parametrize(
    ("lie", "value", "said"),
    [
        ("decode-0.garbles", True, "wrong KV blocks"),
        ("prefill-0.has_connector", False, "no KV connector"),
        (
            "decode-0.pair_error",
            "block_size: prefill has 16, decode 32",
            r"decode-0 cannot use prefill-0\n.*block_size: prefill has 16, decode 32",
        ),
        ("decode-0.dies", True, "vllm exited with status 3: ValueError: layer 3 keeps a state"),
    ],
)
def test_a_pair_that_lies_fails_before_traffic(
    tmp_path: Path, llama: Path, lie: str, value: object, said: str
) -> None:
    """So does one of which an engine dies at its start."""
    say(tmp_path, lie, value)
    with pytest.raises(StartupError, match=said), launched(tmp_path, llama):
        pass


def test_a_slow_pair_is_said_aloud_and_refused_where_that_is_strict(
    tmp_path: Path, llama: Path
) -> None:
    say(tmp_path, "decode-0.gigabytes_per_s", 0.05)
    slow = "PD504 p2p moves 0.05 GB/s between CPUs of a host, less than a tenth of 1"
    with launched(tmp_path, llama) as deployment:
        assert f"warning: prefill-0 -> decode-0 is slow: {slow}" in deployment.output()
        shown = invoke(["status", "--url", deployment.url]).stdout
        assert f"prefill-0 -> decode-0 is slow: {slow}" in shown
        _, page = Api(deployment.url).get("/metrics")
        (speed,) = re.findall(r"^pdlaunch_pair_bytes_per_second{.*} (.*)$", page, re.MULTILINE)
        assert float(speed) == 5e7
        found = invoke(["doctor", deployment.url, "--format", "json"])
        told = {item["rule"]: item for item in json.loads(found.stdout)["findings"]}
        assert told["PD663"]["message"] == slow
    with (
        pytest.raises(StartupError, match=r"decode-0 cannot use prefill-0\n.*refused by --strict"),
        launched(tmp_path, llama, "--strict"),
    ):
        pass


def test_what_ucx_reads_over_in_vllms_own_connector_is_told(tmp_path: Path, llama: Path) -> None:
    title = "| remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda/dev[1] |"
    say(tmp_path, "decode-0.prints", f"{title}\n| 0..inf | software emulation | tcp/lo |\n")
    with launched(tmp_path, llama, "--kv-connector", "vllm-nixl") as deployment:
        path = "nixl/vLLM (tcp, software emulation)"
        (pair,) = Api(deployment.url).get_object("/pdlaunch/status")[1]["pairs"]
        assert pair["path"] == path
        assert path in invoke(["status", "--url", deployment.url]).stdout
        assert path in invoke(["doctor", deployment.url]).stdout


def test_an_engine_does_not_start_anew_with_another_model(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "models")
    with launched(tmp_path, model) as deployment:
        tokenizer = model / "tokenizer.json"
        before = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:12]
        tokenizer.write_text(tokenizer.read_text() + " ")
        after = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:12]
        os.kill(pid_of(tmp_path, "decode-0"), signal.SIGKILL)
        told = f"tokenizer.json (SHA-256 {before} before, SHA-256 {after} now)"
        await_true(lambda: told in deployment.output(), "both digests are told")
        assert states(deployment.url).get("decode-0") != "ready"
