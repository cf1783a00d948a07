"""Order and count of the bindings to the CUDA device, with a fake platform."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pdlaunch.machine.cuda_driver import DriverError, has_accelerator
from pdlaunch.transfer.connectors.connector import Connection, LocalMemory, PeerAgent, PushJob
from pdlaunch.transfer.connectors.device_binding import DeviceBinding
from pdlaunch.transfer.connectors.pushing import PushingConnector
from tests.transfer.fakes import layout_of, random_cache

NUM_SENDERS = 3
JOB = PushJob(b"", [], range(0))


class FakeCuda:
    """Device of each thread, and who has set it."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.history: list[tuple[str, int]] = []

    def set_device(self, device: int) -> None:
        self.local.device = device
        self.history.append((threading.current_thread().name, device))


class FakeTensor:
    """A KV cache on ``cuda:2``."""

    device = torch.device("cuda:2")

    def get_device(self) -> int:
        return 2


class BuildingConnector(PushingConnector):
    """Its library changes the device of the thread that builds it; every write waits until all
    senders have one.
    """

    name = path = "building"

    def __init__(self, cuda: FakeCuda, binding: DeviceBinding) -> None:
        super().__init__("prefill-0/rank-2", 1, num_sender_threads=NUM_SENDERS, binding=binding)
        self.cuda = cuda
        self.written_from: list[int | None] = []
        self.all_write = threading.Barrier(NUM_SENDERS)

    def _start(self, memory: LocalMemory) -> None:
        self.cuda.history.append(("built", -1))
        self.cuda.local.device = 0

    def _stop(self) -> None: ...

    def _write(self, memory: LocalMemory, job: PushJob) -> None:
        self.all_write.wait(10)
        self.written_from.append(getattr(self.cuda.local, "device", None))

    def agent_metadata(self) -> bytes:
        return b""

    def connect(self, peer: PeerAgent) -> Connection:
        raise NotImplementedError


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def connectors(
    cuda: FakeCuda, binding: DeviceBinding, kv_cache: Any
) -> Iterator[BuildingConnector]:
    connector = BuildingConnector(cuda, binding)
    connector.open(LocalMemory(kv_cache, torch.zeros(1), layout_of()))
    yield connector
    connector.close()


def write_twice_with_every_sender(connector: BuildingConnector) -> None:
    for _ in range(2):
        handles = [connector.push(JOB) for _ in range(NUM_SENDERS)]
        for handle in handles:
            cast(Any, handle).future.result(10)
            assert handle.poll() == ""


def test_the_device_is_bound_before_and_after_building_and_once_in_every_sender(
    cuda: FakeCuda,
) -> None:
    for connector in connectors(cuda, DeviceBinding(cuda), FakeTensor()):
        write_twice_with_every_sender(connector)
    opener = threading.current_thread().name
    assert cuda.history[:3] == [(opener, 2), ("built", -1), (opener, 2)]
    senders = cuda.history[3:]
    assert [device for _, device in senders] == [2] * NUM_SENDERS
    assert len({thread for thread, _ in senders}) == NUM_SENDERS
    assert connector.written_from == [2] * 2 * NUM_SENDERS
    assert cuda.local.device == 2


def test_nothing_is_bound_without_an_accelerator(cuda: FakeCuda) -> None:
    for connector in connectors(cuda, DeviceBinding(None), FakeTensor()):
        write_twice_with_every_sender(connector)
    assert cuda.history == [("built", -1)]


def test_nothing_is_bound_for_a_kv_cache_on_the_host(cuda: FakeCuda) -> None:
    for connector in connectors(cuda, DeviceBinding(cuda), random_cache(layout_of(), 1, seed=0)):
        write_twice_with_every_sender(connector)
    assert cuda.history == [("built", -1)]


def test_an_error_in_a_sender_is_the_answer(cuda: FakeCuda) -> None:
    for connector in connectors(cuda, DeviceBinding(cuda), FakeTensor()):
        connector.all_write.abort()
        handle = connector.push(JOB)
        assert cast(Any, handle).future.exception(10) is not None
        assert "prefill-0/rank-2#1: " in str(handle.poll())


def test_the_platform_says_whether_there_is_an_accelerator() -> None:
    def no_driver() -> Any:
        raise DriverError("no driver")

    assert not has_accelerator(no_driver)
    assert not has_accelerator(lambda: cast(Any, SimpleNamespace(gpus=())))
    assert has_accelerator(lambda: cast(Any, SimpleNamespace(gpus=("gpu",))))
