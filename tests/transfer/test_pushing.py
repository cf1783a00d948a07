"""Order and count of the bindings to the CUDA device, with a fake platform."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pdlaunch.transfer.connectors.connector import Connection, LocalMemory, PeerAgent, PushJob
from pdlaunch.transfer.connectors.pushing import PushingConnector
from tests.transfer.fakes import layout_of, random_cache

NUM_SENDERS = 3
JOB = PushJob(b"", [], range(0))


class FakeCuda:
    """Device of each thread, and who has set it."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.history: list[tuple[str, int]] = []

    def set_device(self, device: torch.device) -> None:
        self.local.device = device.index
        self.history.append((threading.current_thread().name, device.index))


class FakeTensor:
    """A KV cache on ``cuda:2``."""

    device = torch.device("cuda:2")


class BuildingConnector(PushingConnector):
    """Its library changes the device of the thread that builds it; every write waits until all
    senders have one.
    """

    name = path = "building"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("prefill-0/rank-2", 1, num_sender_threads=NUM_SENDERS)
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
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "set_device", cuda.set_device)
    return cuda


def connectors(cuda: FakeCuda, kv_cache: Any) -> Iterator[BuildingConnector]:
    connector = BuildingConnector(cuda)
    connector.open(LocalMemory(kv_cache, torch.zeros(1), layout_of()))
    yield connector
    connector.close()


def write_twice_with_every_sender(connector: BuildingConnector) -> None:
    for _ in range(2):
        for write in [connector.push(JOB) for _ in range(NUM_SENDERS)]:
            write.result(10)


def test_the_device_is_bound_before_and_after_building_and_once_in_every_sender(
    cuda: FakeCuda,
) -> None:
    for connector in connectors(cuda, FakeTensor()):
        write_twice_with_every_sender(connector)
    opener = threading.current_thread().name
    assert cuda.history[:3] == [(opener, 2), ("built", -1), (opener, 2)]
    senders = cuda.history[3:]
    assert [device for _, device in senders] == [2] * NUM_SENDERS
    assert len({thread for thread, _ in senders}) == NUM_SENDERS
    assert connector.written_from == [2] * 2 * NUM_SENDERS
    assert cuda.local.device == 2


def test_nothing_is_bound_for_a_kv_cache_on_the_host(cuda: FakeCuda) -> None:
    for connector in connectors(cuda, random_cache(layout_of(), 1, seed=0)):
        write_twice_with_every_sender(connector)
    assert cuda.history == [("built", -1)]


def test_an_error_in_a_sender_is_the_answer(cuda: FakeCuda) -> None:
    for connector in connectors(cuda, FakeTensor()):
        connector.all_write.abort()
        assert connector.push(JOB).exception(10) is not None
