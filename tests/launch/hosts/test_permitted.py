"""An agent starts modules of pdlaunch with its own Python, and executables that its side allows."""

import sys
from pathlib import Path

import pytest

from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.agent import allowed_executables, permitted
from pdlaunch.planning.plan import ProcessSpec

PYTHON = "/of/the/supervisor/python"


def process(*command: str, kind: str = "server", **environment: str) -> ProcessSpec:
    return ProcessSpec(
        name="prefill-0", kind=kind, unit="u", command=command, environment=environment
    )


def module(name: str, *words: str, kind: str = "rank", **environment: str) -> ProcessSpec:
    return process(PYTHON, "-P", "-m", name, *words, kind=kind, **environment)


@pytest.mark.parametrize("name", ["engine", "engine.server"])
def test_modules_run_with_the_agents_own_python(name: str) -> None:
    started = permitted(module(f"pdlaunch.{name}", "--name", "x", UCX_TLS="tcp"), {})
    assert started.command == (sys.executable, "-P", "-m", f"pdlaunch.{name}", "--name", "x")


@pytest.mark.parametrize(
    "spec",
    [
        process("/bin/sh", "-c", "id"),
        process(PYTHON, "-c", "print()"),
        process(PYTHON, "-P", "-m"),
        process(),
        module("pdlaunch.protocol.process.bootstrap", "antigravity"),
        module("pdlaunch.router"),
        module("pdlaunch.engine.rank"),
        module("pdlaunch.engine", kind="convert"),
        module("pdlaunch.launch.sidecar", kind="server"),
        module("pdlaunch.launch.sidecar", "--", kind="server"),
    ],
    ids=lambda spec: " ".join(spec.command) or "nothing",
)
def test_nothing_else_is_started(spec: ProcessSpec) -> None:
    with pytest.raises(ConfigError):
        permitted(spec, {})


@pytest.mark.parametrize(
    "name",
    [
        *("LD_PRELOAD", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "CUDA_INJECTION64_PATH"),
        *("NIXL_PLUGIN_DIR", "UCX_MODULE_DIR", "NCCL_NET_PLUGIN", "OPENSSL_CONF"),
    ],
)
def test_variables_that_choose_the_code_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        permitted(module("pdlaunch.engine", **{name: "/tmp/x"}), {})
    assert permitted(module("pdlaunch.engine", PYTHONUNBUFFERED="1"), {})


def test_an_executable_is_started_where_the_agent_has_it(tmp_path: Path) -> None:
    own = tmp_path / "vllm"
    own.write_text("")
    own.chmod(0o755)
    allowed = allowed_executables([str(own)])
    sidecar = module(
        "pdlaunch.launch.sidecar", "--name", "p", "--", "/elsewhere/vllm", "serve", kind="server"
    )
    assert permitted(sidecar, allowed).command[-2:] == (str(own), "serve")
    with pytest.raises(ConfigError, match="--allow-executable vllm"):
        permitted(sidecar, {"other": str(own)})


def test_an_executable_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no executable no-such-thing"):
        allowed_executables(["no-such-thing"])
