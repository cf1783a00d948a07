"""What an engine of vLLM is given, and what is left of it when its sidecar is killed."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

import pdlaunch
from pdlaunch.config.model_files.weights import changes, model_digest
from pdlaunch.errors import StartupError
from pdlaunch.launch.sidecar.engine import (
    EngineOutput,
    SidecarOptions,
    connector_environment,
    engine_environment,
    hold_side_channel,
    with_events_at,
)
from pdlaunch.machine.network import device_of
from pdlaunch.observe.causes import Cause
from pdlaunch.protocol.engine_link import KV_SETUP
from pdlaunch.protocol.process.bootstrap import Bootstrap


def test_events_are_published_at_a_socket_of_the_launch() -> None:
    command = ("vllm", "--kv-events-config", '{"enable_kv_cache_events":true}', "--seed", "1")
    changed = with_events_at(command, "ipc:///run/decode-0.events")
    assert changed[3:] == command[3:]
    assert json.loads(changed[2]) == {
        "enable_kv_cache_events": True,
        "endpoint": "ipc:///run/decode-0.events",
        "replay_endpoint": "ipc:///run/decode-0.events.replay",
    }
    own = ("vllm", "--kv-events-config", '{"endpoint":"ipc:///mine"}')
    assert json.loads(with_events_at(own, "ipc:///other")[2])["endpoint"] == "ipc:///mine"
    added = with_events_at(("vllm", "--seed", "1"), "ipc:///run/decode-0.events")
    assert added[:4] == ("vllm", "--seed", "1", "--kv-events-config")
    assert json.loads(added[4]) == json.loads(changed[2])


def test_files_that_flags_name_are_pinned_too(tmp_path: Path) -> None:
    model, draft, lora, other = (tmp_path / name for name in ("model", "draft", "lora", "other"))
    files = {
        *(tmp_path / "chat.jinja", draft / "model.safetensors", draft / "config.json"),
        *(lora / "adapter_model.safetensors", other / "adapter_model.safetensors"),
    }
    own = {model / name for name in ("config.json", "tekken.json", "modeling.py")}
    for file in files | own:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    speculative = json.dumps({"model": str(draft), "num_speculative_tokens": 2})
    adapters = f"a={lora}", json.dumps({"name": "b", "path": str(other)})
    flags = ("--chat-template", str(tmp_path / "chat.jinja"), "--speculative-config", speculative)
    options = SidecarOptions(
        ("vllm", "serve", str(model), *flags, "--lora-modules", *adapters),
        is_exact=True,
        hang_timeout_s=0.0,
        unverified="",
    )
    before = options.model_files()
    assert before.keys() == {str(file) for file in files} | {file.name for file in own}
    for file in files | own:
        file.write_text("{ }")
        found = options.model_files()
        assert f"{file if file in files else file.name} (" in changes(before, found)
        assert (model_digest(found) == model_digest(before)) == (file in files), "roles may differ"
        assert not changes({}, {name: found[name] for name in found if "/" in name})
        file.write_text("{}")


def free_range(size: int) -> str:
    for first in range(23_000, 30_000, size):
        try:
            for port in range(first, first + size):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return f"{first}-{first + size - 1}"
    raise AssertionError("no free ports")


def number(port: socket.socket) -> int:
    return int(port.getsockname()[1])


@pytest.fixture
def not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 127.0.0.1 for an address that others reach: a test opens nothing to them."""
    monkeypatch.setattr("pdlaunch.launch.sidecar.engine.is_loopback", lambda _: False)


@pytest.mark.usefixtures("not_loopback")
def test_ports_of_a_range_are_kept_for_their_engines() -> None:
    ports = free_range(3)
    first, last = map(int, ports.split("-"))
    kept = [hold_side_channel("127.0.0.1", ports) for _ in range(3)]
    assert sorted(number(each) for each in kept) == list(range(first, last + 1))
    with pytest.raises(StartupError, match=r"no port of 127.0.0.1 is free"):
        hold_side_channel("127.0.0.1", ports)
    # UCX and others take it for busy; the engine's ZMQ socket listens there, and again after it.
    for _ in range(2):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", number(kept[0])))
        with zmq.Context() as context, context.socket(zmq.ROUTER) as engine:
            engine.bind(f"tcp://127.0.0.1:{number(kept[0])}")
    freed = number(kept[1])
    kept[1].close()
    again = hold_side_channel("127.0.0.1", ports)
    assert number(again) == freed
    for each in (kept[0], kept[2], again):
        each.close()


def test_on_loopback_it_is_any_free_port() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        port = hold_side_channel(host, "1-1")
        assert number(port) > 1
        port.close()


def test_ucx_gets_the_name_of_the_device_that_has_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_side_channel("127.0.0.1", "") as port:
        monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
        assert "UCX_NET_DEVICES" not in engine_environment(tmp_path, None, port)
        monkeypatch.setenv("UCX_NET_DEVICES", "127.0.0.1,mlx5_0:1")
        found = engine_environment(tmp_path, None, port)
        assert found["UCX_NET_DEVICES"] == f"{device_of('127.0.0.1')},mlx5_0:1"
        monkeypatch.setenv("UCX_NET_DEVICES", "192.0.2.1")
        with pytest.raises(StartupError, match=r"no network device .* 192\.0\.2\.1"):
            engine_environment(tmp_path, None, port)


def variables(folder: Path) -> dict[str, str]:
    spec = {"bind_address": "", "advertise_address": "", "kv_transfer": "{}", "by_head": False}
    told = {"name": "decode-0", "incarnation": 1, "control": "", "log_level": "info"}
    told |= {"connector": {"role": "decode", "engine_id": "e", **spec}, "run_dir": str(folder)}
    bootstrap = msgspec.convert(
        told | {"keys": dict.fromkeys(("public", "secret", "http_token"), "")}, Bootstrap
    )
    return connector_environment(bootstrap, "ipc:///link", {})


def test_the_connector_finds_its_setup_and_of_what_is_installed_here_pdlaunch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/first:/second")
    found = variables(tmp_path)
    assert found[KV_SETUP] == str(tmp_path / "decode-0.kv.json")
    packages, *paths = found["PYTHONPATH"].split(":")
    assert paths == ["/first", "/second"]
    (package,) = Path(packages).iterdir()
    assert package.name == "pdlaunch"
    assert package.resolve() == Path(pdlaunch.__file__).parent.resolve()


@pytest.mark.processes
def test_the_connectors_link_is_imported_without_packages_that_vllm_need_not_have(
    tmp_path: Path,
) -> None:
    program = (
        "import sys, pdlaunch.protocol.engine_link, pdlaunch.config.kv_transfer, pdlaunch\n"
        "print(pdlaunch.__file__)\n"
        "missing = {'aiohttp', 'rich', 'typer', 'yaml', 'prometheus_client', 'tokenizers'}\n"
        "print(sorted(missing & set(sys.modules)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": variables(tmp_path)["PYTHONPATH"]},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    path, missing = found.stdout.splitlines()
    assert path.startswith(str(tmp_path))
    assert missing == "[]"


def test_the_last_error_of_an_engine_is_the_one_that_others_point_to(tmp_path: Path) -> None:
    log = tmp_path / "decode-0.log"
    log.write_text("ValueError: of the last start\n")
    output = EngineOutput(log)
    assert output.cause() is None
    with log.open("a") as file:
        file.write(
            "(EngineCore pid=7) ERROR 11-24 14:00:00 [core.py:866] ValueError: layer 3: no proof\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
        )
    assert output.cause() == Cause("ValueError: layer 3: no proof", "")
    assert EngineOutput(tmp_path / "none").cause() is None


SIDECAR = """
import subprocess, sys, time
from pdlaunch.launch.sidecar.engine import guard_group
guard = guard_group()
server = subprocess.Popen(
    ("sh", "-c", "sleep 600 & echo $!; wait"), stdout=subprocess.PIPE, text=True
)
print(guard.pid, server.pid, server.stdout.readline().strip(), flush=True)
time.sleep(600)
"""


@pytest.mark.processes
def test_children_of_the_server_go_with_a_sidecar_that_is_killed() -> None:
    with subprocess.Popen(
        (sys.executable, "-c", SIDECAR), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as sidecar:
        assert sidecar.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in sidecar.stdout.readline().split()]
        guard, _, _ = processes
        # The supervisor's signals reach the group, and the guard is of it.
        guard.send_signal(signal.SIGTERM)
        sidecar.kill()
        assert not psutil.wait_procs(processes, timeout=180)[1], "server, its child and the guard"
