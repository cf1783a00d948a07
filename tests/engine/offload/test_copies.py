"""Host memory, and the queues between it and the KV cache, on a CPU and on a GPU."""

import queue
import threading
from collections.abc import Sequence

import pytest
import torch

from pdlaunch.engine.offload.planner import DIRECTIONS, Direction, JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import (
    Copy,
    CopyQueue,
    HostMemory,
    copy_by_engines,
    copy_by_thread,
)
from pdlaunch.errors import ConfigError, TransferError
from pdlaunch.transfer.regions import Addresses

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu = pytest.param("cuda", marks=on_a_gpu)


class Queues:
    """Both directions between random blocks and host memory."""

    def __init__(
        self, num_blocks: int, block_bytes: int, device: str = "cpu", copy: Copy | None = None
    ) -> None:
        self.blocks = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8).to(device)
        self.host = HostMemory(num_blocks, block_bytes, pin=device == "cuda")
        self.ends: queue.SimpleQueue[JobFinished] = queue.SimpleQueue()
        copy = copy or (copy_by_thread if device == "cpu" else copy_by_engines())
        self._queues = {
            direction: CopyQueue(direction, self.blocks, self.host, self.ends.put, copy)
            for direction in DIRECTIONS
        }

    def submit(
        self, job_id: int, direction: Direction, block_ids: Sequence[int], host_ids: Sequence[int]
    ) -> None:
        job = OffloadJob(job_id, direction, [*block_ids], [*host_ids], [])
        self._queues[direction].submit(job)

    def end(self) -> JobFinished:
        return self.ends.get(timeout=60)

    def close(self, timeout_s: float = 60) -> bool:
        ended = [each.close(timeout_s) for each in self._queues.values()]
        if all(ended):
            self.host.close()
        return all(ended)


class GatedCopy:
    """Jobs wait for the gate, and those of two blocks fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(self, destinations: Addresses, sources: Addresses, sizes: Addresses) -> None:
        assert self.gate.wait(60)
        if len(sizes) > 1:
            raise TransferError("a block is broken")
        copy_by_thread(destinations, sources, sizes)


def test_a_copy_that_runs_is_waited_for_and_failures_are_reported() -> None:
    copy = GatedCopy()
    queues = Queues(8, 64, copy=copy)
    queues.submit(1, "store", [7], [0])
    queues.submit(2, "store", [5, 0], [2, 3])
    assert not queues.close(timeout_s=0.01), "a copy still runs"
    copy.gate.set()
    first, second = queues.end(), queues.end()
    assert (first.job_id, first.ok) == (1, True)
    assert (second.job_id, second.ok, second.num_bytes) == (2, False, 0)
    assert "a block is broken" in second.error


@pytest.mark.parametrize("device", [gpu])
def test_a_store_is_queued_behind_the_work_that_fills_its_blocks(device: str) -> None:
    queues = Queues(64, 65536, device)
    torch.cuda._sleep(200_000_000)
    queues.blocks.fill_(7)
    queues.submit(1, "store", range(64), range(64))
    assert queues.ends.empty()
    assert queues.end().ok
    assert bool((queues.host.memory == 7).all())
    assert queues.close()


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize(
    "broken", [torch.cuda.Stream.wait_stream, torch.cuda.Event.record], ids=["wait", "record"]
)
def test_an_error_of_the_device_is_the_jobs_own(
    broken: object, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the step loop, and with it the engine."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    queues = Queues(8, 4096, device)
    owner = torch.cuda.Stream if broken is torch.cuda.Stream.wait_stream else torch.cuda.Event
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken.__name__, refuse)  # type: ignore[attr-defined]
        queues.submit(1, "store", [1], [1])
    report = queues.end()
    assert (report.ok, report.error) == (False, "RuntimeError: CUDA error: out of memory")
    queues.submit(2, "store", [1], [1])
    assert queues.end().ok
    assert queues.close()


def test_memory_is_pinned_once_and_a_refusal_is_named() -> None:
    pinned: dict[int, int] = {}

    def make(code: int) -> HostMemory:
        return HostMemory(
            3,
            4000,
            pin=True,
            register=lambda address, size: pinned.update({address: size}) or code,  # type: ignore[func-returns-value]
            unregister=pinned.__delitem__,
        )

    memory = make(0)
    assert pinned == {memory.memory.data_ptr(): 3 * 4096}
    assert memory.block(2).data_ptr() == memory.memory.data_ptr() + 2 * 4096
    memory.close()
    assert pinned == {}
    with pytest.raises(ConfigError, match=r"needs 12288 bytes.* pinning .* CUDA error 2") as error:
        make(2)
    assert error.value.field == "kv_offload.host_memory"


def test_more_host_memory_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="this machine has"):
        HostMemory(2**40, 4096, pin=False)
