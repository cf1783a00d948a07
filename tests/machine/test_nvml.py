"""Free memory of GPUs, as NVML tells it. A stand-in for ``pynvml`` plays machines without GPUs."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pdlaunch.machine.facts import Gpu
from pdlaunch.machine.probe import read_gpus, with_free_memory

A, B = "0000:19:00.0", "0000:3b:00.0"
GPUS = (
    Gpu(0, "NVIDIA H200", pci_bus_id=A),
    Gpu(1, "NVIDIA H200", pci_bus_id=B),
    Gpu(2, "NVIDIA H200 MIG 1g.18gb", pci_bus_id=A),
)


@dataclass
class FakeNvml:
    missing: str = ""
    open_count: int = 0

    NVMLError = pynvml.NVMLError

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            if name == self.missing or arguments == (B.encode(),):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
            self.open_count += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return SimpleNamespace(free=5 << 30)

        return answer


def test_free_memory_is_told_of_each_whole_gpu() -> None:
    nvml: Any = FakeNvml()
    gpus = with_free_memory(GPUS, nvml)
    assert [gpu.free_memory_bytes for gpu in gpus] == [5 << 30, None, None]
    assert nvml.open_count == 0


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_what_nvml_does_not_tell_is_not_known(missing: str) -> None:
    nvml: Any = FakeNvml(missing)
    assert with_free_memory(GPUS, nvml) == GPUS


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA device")
def test_the_real_nvml() -> None:
    assert all(gpu.free_memory_bytes for gpu in with_free_memory(read_gpus()))
