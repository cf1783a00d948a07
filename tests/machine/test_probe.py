import os
import socket
from pathlib import Path

import pytest

from pdlaunch.machine import probe
from pdlaunch.machine.facts import Gpu
from pdlaunch.machine.host import has_native_bf16
from pdlaunch.machine.network import probe_port
from pdlaunch.machine.probe import DriverError, probe_machine


def test_this_machine() -> None:
    machine = probe_machine()
    assert machine.system == "Linux"
    assert machine.num_cpus == len(os.sched_getaffinity(0))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 28 < machine.memory_bytes <= whole
    assert 0 <= machine.shm_free_bytes <= machine.shm_bytes != 0
    assert machine.unknown == {}


def test_a_probe_that_fails_is_named_and_hurts_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise PermissionError("not for you")

    monkeypatch.setattr(probe.host, "shared_memory", fail)
    monkeypatch.setattr(probe, "read_gpus", fail)
    machine = probe_machine()
    reason = "PermissionError: not for you"
    assert machine.unknown == {"gpus": reason, "shm": reason}
    assert machine.memory_bytes


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_bf16 amx\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
    ],
)
def test_native_bf16(tmp_path: Path, text: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_native_bf16(tmp_path / "cpuinfo") is native


def test_ports_are_tried_as_servers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_port("127.0.0.1", 0) == ""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert "busy" in probe_port("127.0.0.1", listener.getsockname()[1])
        command = ["python", "-P", "-m", "pdlaunch.router"]
        monkeypatch.setattr("psutil.Process.cmdline", lambda _: command)
        assert "another launch of pdlaunch, pid" in probe_port(
            "127.0.0.1", listener.getsockname()[1]
        )
        assert "busy" not in probe_port("::", listener.getsockname()[1])
    assert "not an address" in probe_port("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x068000", False),
        ("0x1234", "0x030000", False),
        (None, None, False),
    ],
)
def test_gpus_that_nobody_sees_are_found_on_the_bus(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    vendor: str | None,
    kind: str | None,
    found: bool,
) -> None:
    device = tmp_path / "0000:18:00.0"
    device.mkdir()
    if vendor is not None:
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def no_driver() -> tuple[Gpu, ...]:
        raise DriverError("no CUDA driver")

    monkeypatch.setattr(probe, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(probe, "read_gpus", no_driver)
    assert probe_machine().has_hidden_gpus is found
    assert probe_machine().driver_error == "no CUDA driver"
    monkeypatch.setattr(probe, "read_gpus", lambda: (Gpu(0, "H200"),))
    machine = probe_machine()
    assert [gpu.name for gpu in machine.gpus] == ["H200"]
    assert not machine.has_hidden_gpus
