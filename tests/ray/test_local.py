"""``--placement ray`` without a cluster: Ray runs for the launch alone, and ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import clean_environ
from tests.e2e.tiny_models import make_tiny_model
from tests.netns.hosts import Host, new_network, signal_inner, why_not
from tests.ray.far import PORT, answer, until, until_ready

HOME = "/tmp/home"
COMMAND = (
    *(sys.executable, "-P", "-m", "pdlaunch", "serve", "--model", "/tmp/llama"),
    *("--device", "cpu", "--placement", "ray", "--agent-timeout", "10", "--port", str(PORT)),
)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host on a network, with processes of its own: no other Ray can be found there."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    if reason := why_not():
        pytest.skip(reason)
    with new_network("a") as network:
        host = network["a"]
        host.run("mkdir", HOME)
        make_tiny_model("llama", host.file("/tmp"))
        yield host


@contextlib.contextmanager
def served(host: Host) -> Iterator[subprocess.Popen[bytes]]:
    """Run a launch in a group of processes of its own, as a shell does, until it is ready."""
    environ = clean_environ() | {"HOME": HOME}
    environ.pop("RAY_ADDRESS", None)
    with (
        host.file("/tmp/serve.out").open("wb") as output,
        host.running(
            *COMMAND,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as serve,
    ):
        until_ready(host, serve)
        yield serve


def until_nothing_runs(host: Host) -> None:
    until(lambda: not host.processes(), lambda: str([p.cmdline() for p in host.processes()]))


def run_folders(host: Host) -> list[str]:
    return sorted(path.name for path in host.file("/tmp").glob("pdlaunch-run-*"))


def test_ray_of_its_own_is_on_loopback_and_leaves_with_the_launch(host: Host) -> None:
    with served(host) as serve:
        listening = host.listening()
        on_loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        assert [each for each in listening if each.address not in on_loopback] == []
        assert any("raylet" in each.process for each in listening), "Ray is there"
        assert 8265 not in {each.port for each in listening}, "the dashboard's port"
        right = answer(host)
        # Ctrl-C in a terminal reaches all that the shell's job has started.
        os.killpg(serve.pid, signal.SIGINT)
        until_nothing_runs(host)
    assert run_folders(host) == []
    assert not host.file("/tmp/ray").exists()
    assert not host.file(f"{HOME}/.ray").exists()
    with served(host) as serve:
        assert answer(host) == right
        signal_inner(serve)
        until_nothing_runs(host)
