import os
import socket
import sys

import pytest

from pdlaunch.machine import availability, probe
from pdlaunch.machine.availability import ProcessOutcome, probe_port, run_briefly
from pdlaunch.machine.cuda_driver import Driver
from pdlaunch.machine.facts import Gpu
from pdlaunch.machine.host import (
    find_libraries,
    has_native_bf16,
    memory_bytes,
    read_shared_memory,
    usable_cpus,
)
from pdlaunch.machine.probe import probe_machine


def test_this_machine():
    machine = probe_machine()
    assert machine.system == "Linux"
    assert len(machine.cpus) >= 1
    assert machine.memory_bytes > 1 << 28
    assert machine.libraries.torch
    assert machine.libraries.nixl.backends
    assert machine.limits.num_open_files != 0
    assert machine.shm.total_bytes > 0
    assert machine.unknown == {}


def test_a_probe_that_fails_is_named_and_hurts_nothing_else(monkeypatch):
    def fail():
        raise PermissionError("not for you")

    monkeypatch.setattr(probe, "read_limits", fail)
    machine = probe_machine()
    assert machine.unknown == {"limits": "PermissionError: not for you"}
    assert machine.libraries.torch


@pytest.mark.processes
def test_nothing_heavy_is_imported():
    import subprocess

    program = (
        "import sys; from pdlaunch.machine.probe import probe_machine; probe_machine(); "
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "nixl", "pydantic"} & set(result.stdout.split())


def test_gpus_come_from_the_driver(monkeypatch):
    monkeypatch.setattr(
        probe, "read_driver", lambda: Driver((13, 0), (Gpu(0, "H200", has_virtual_memory=True),))
    )
    machine = probe_machine()
    assert [gpu.name for gpu in machine.gpus] == ["H200"]
    assert machine.cumem.available is (sys.platform == "linux")


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_bf16 amx\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("", False),
    ],
)
def test_native_bf16(tmp_path, text, native):
    (tmp_path / "cpuinfo").write_text(text)
    assert has_native_bf16(tmp_path / "cpuinfo") is native


def test_native_bf16_without_the_file(tmp_path):
    assert has_native_bf16(tmp_path / "none") is False


def test_cores_and_memory():
    assert set(usable_cpus()) == os.sched_getaffinity(0)
    assert memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class TestSharedMemory:
    def test_sizes(self, tmp_path):
        shm = read_shared_memory(tmp_path)
        assert 0 <= shm.free_bytes <= shm.total_bytes


class TestPorts:
    def test_a_free_port(self):
        assert probe_port("127.0.0.1", 0).problem is None

    def test_a_busy_port(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            assert probe_port("127.0.0.1", listener.getsockname()[1]).problem == "busy"

    def test_numbers_wait_for_no_thread(self, monkeypatch):
        monkeypatch.setattr(availability, "RESOLVE_TIMEOUT_S", 0)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            assert probe_port("127.0.0.1", listener.getsockname()[1]).problem == "busy"

    def test_an_address_of_another_machine(self):
        assert probe_port("192.0.2.1", 0).problem == "not here"

    @pytest.mark.parametrize("host", ["a\0b", "x" * 300, "..", "\udc80"])
    def test_names_that_are_none(self, host):
        state = probe_port(host, 0)
        assert state is None or state.problem == "unknown host"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may listen everywhere")
    def test_a_privileged_port(self):
        assert probe_port("127.0.0.1", 80).problem in ("privileged", None)


class TestLibraries:
    def test_what_is_installed_here(self):
        import torch

        found = find_libraries()
        assert found.torch == torch.__version__
        assert found.torch_cuda == torch.version.cuda
        assert found.transformers
        assert found.nixl.version


@pytest.mark.processes
class TestShortLivedProcesses:
    def test_what_one_leaves(self):
        program = (
            "import os, sys; print(os.environ['A']); sys.stderr.write('why\\n\\n'); sys.exit(3)"
        )
        outcome = run_briefly([sys.executable, "-c", program], {"A": "b"}, 60)
        assert outcome == ProcessOutcome(3, ("b",), ("why", ""))
        assert outcome.problem() == "why"

    def test_one_that_says_nothing(self):
        outcome = run_briefly([sys.executable, "-c", "import os; os._exit(4)"], {}, 60)
        assert outcome.problem() == "exit code 4"

    def test_one_is_killed_at_its_deadline(self):
        outcome = run_briefly([sys.executable, "-c", "import time; time.sleep(600)"], {}, 0.2)
        assert outcome.returncode is None
        assert outcome.problem() == "not done after 0.2 s"

    def test_one_that_cannot_be_started(self):
        assert "cannot be tried" in run_briefly(["/nonexistent"], {}, 1).problem()


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x10de", "0x068000", False),
        ("0x1234", "0x030000", False),
        (None, None, False),
    ],
)
def test_gpus_that_nobody_sees_are_found_on_the_bus(monkeypatch, tmp_path, vendor, kind, found):
    device = tmp_path / "0000:18:00.0"
    device.mkdir()
    if vendor is not None:
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(probe, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(probe, "read_driver", lambda: None)
    assert probe_machine().has_hidden_gpus is found
    monkeypatch.setattr(probe, "read_driver", lambda: Driver((13, 0), (Gpu(0, "H200"),)))
    assert not probe_machine().has_hidden_gpus
