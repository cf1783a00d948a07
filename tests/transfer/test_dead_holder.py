"""``kill -9`` of real holders: what they have leased is pulled from the memory that they leave
behind, where that can be.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.sockets import LaunchKeys, new_launch_keys
from pdlaunch.protocol.transfer import LeaseGranted, PullFinished
from tests.e2e.waiting import await_true
from tests.transfer.fakes import spec_of
from tests.transfer.rank_process import RankHandle, RankOptions, grant, pull

BLOCKS = [3, 1, 4]
DEVICES = torch.cuda.device_count()
gpus = [
    pytest.param(
        ("cuda:0", "cuda:0"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICES < 1, reason="needs a CUDA device")],
    ),
    pytest.param(
        ("cuda:0", "cuda:1"),
        marks=[
            pytest.mark.multi_gpu,
            pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices"),
        ],
    ),
]
GIB = 2**30
LARGE = {"num_layers": 64, "head_dim": 128}
"""Blocks of 6 MiB."""


@pytest.fixture
def keys() -> LaunchKeys:
    return new_launch_keys()


Start = Callable[..., RankHandle]


@pytest.fixture
def start(keys: LaunchKeys) -> Iterator[Start]:
    """Starts ranks of engines with six KV heads."""
    with ExitStack() as stack:

        def start(
            role: str,
            path: str,
            tp_rank: int = 0,
            tp_size: int = 1,
            device: str = "cpu",
            **sizes: int,
        ) -> RankHandle:
            if device != "cpu":
                pytest.importorskip("cuda.bindings")
            options = RankOptions(
                spec=spec_of(role, name=f"{role}-0", tp_size=tp_size, path=path),
                keys=keys,
                engine_id=role[0] * 32,
                tp_rank=tp_rank,
                num_heads=6 // tp_size,
                total_heads=6,
                device=device,
                with_cumem=device != "cpu",
                **sizes,
            )
            rank = RankHandle(options)
            stack.callback(rank.stop)
            return rank

        yield start


def connect(puller: RankHandle, *holders: RankHandle) -> set[str]:
    """Returns the paths."""
    puller.call("registry", [puller.entry(), *(holder.entry() for holder in holders)])
    return {puller.report(PairReady).path for _ in holders}


def lease(holder: RankHandle, request_id: str) -> np.ndarray:
    """Returns the bytes, once the lease is written down."""
    holder.submit(grant(request_id, BLOCKS))
    assert holder.event(LeaseGranted).request_id == request_id
    return holder.blocks(BLOCKS)


def finish(puller: RankHandle, holder: RankHandle, request_id: str) -> PullFinished:
    puller.submit(pull(f"pull-{request_id}", holder.remote(request_id), [9, 2, 6]))
    return puller.event(PullFinished)


@pytest.mark.parametrize("devices", [("cpu", "cpu"), *gpus], ids="-".join)
def test_leases_of_a_killed_rank_are_pulled(start: Start, devices: tuple[str, str]) -> None:
    holder, puller = (
        start(role, "p2p", device=device)
        for role, device in zip(("prefill", "decode"), devices, strict=True)
    )
    if any(path.startswith("p2p/fabric") for path in connect(puller, holder)):
        pytest.skip("memory with fabric handles is not known to outlive its owner")
    content, _ = lease(holder, "r"), lease(holder, "never pulled")
    holder.stop()
    puller.call("registry", [puller.entry()])
    finished = finish(puller, holder, "r")
    assert (finished.ok, finished.departed) == (True, True), finished.error
    np.testing.assert_array_equal(puller.blocks([9, 2, 6]), content)


@pytest.mark.parametrize("devices", gpus, ids="-".join)
def test_a_device_has_the_memory_back_after_the_last_pull(
    start: Start, devices: tuple[str, str]
) -> None:
    """By the driver's own count. What else the reader takes there meanwhile, kernels and such, is
    far less than the KV cache.
    """
    puller = start("decode", "p2p", device=devices[1], **LARGE)
    assert puller.endpoint  # it has started, and has its own memory
    before = torch.cuda.mem_get_info(devices[0])[0]

    def taken_bytes() -> int:
        return before - torch.cuda.mem_get_info(devices[0])[0]

    holder = start("prefill", "p2p", device=devices[0], num_blocks=512, **LARGE)
    if any(path.startswith("p2p/fabric") for path in connect(puller, holder)):
        pytest.skip("memory with fabric handles is not known to outlive its owner")
    for request_id in ("first", "last"):
        lease(holder, request_id)
    holder.stop()
    puller.call("registry", [puller.entry()])
    for request_id in ("first", "last"):
        assert taken_bytes() >= 3 * GIB, "the memory went while a lease could be pulled"
        finished = finish(puller, holder, request_id)
        assert (finished.ok, finished.departed) == (True, True), finished.error
    await_true(lambda: taken_bytes() < GIB, "the memory of the dead rank is unmapped", 30)


def test_a_byte_that_has_changed_since_is_found(start: Start) -> None:
    holder, puller = start("prefill", "p2p"), start("decode", "p2p")
    connect(puller, holder)
    lease(holder, "r")
    holder.call("flip", BLOCKS[1], 2)
    holder.stop()
    puller.call("registry", [puller.entry()])
    finished = finish(puller, holder, "r")
    assert (finished.ok, finished.verification_failed) == (False, True)
    assert f"KV head 2 differs: block {BLOCKS[1]} there, block 2 here" in finished.error


def test_ranks_of_a_tp_group_die_one_after_the_other(start: Start) -> None:
    """The supervisor drops them all from the registry when the first has died, and kills the
    others.
    """
    holders = [start("prefill", "p2p", tp_rank, 2) for tp_rank in range(2)]
    puller = start("decode", "p2p")
    connect(puller, *holders)
    content = np.concatenate([lease(holder, "r") for holder in holders], axis=1)
    assert holders[1].process.pid is not None
    os.kill(holders[1].process.pid, signal.SIGSTOP)
    holders[0].stop()
    puller.call("registry", [puller.entry()])
    puller.submit(pull("p", holders[0].remote("r"), [9, 2, 6]))
    holders[1].stop()
    finished = puller.event(PullFinished)
    assert (finished.ok, finished.departed) == (True, True), finished.error
    np.testing.assert_array_equal(puller.blocks([9, 2, 6]), content)


def test_other_memory_dies_with_its_owner(start: Start) -> None:
    holder, puller = start("prefill", "nixl"), start("decode", "nixl")
    connect(puller, holder)
    holder.submit(grant("r", BLOCKS))
    holder.stop()
    puller.call("registry", [puller.entry()])
    finished = finish(puller, holder, "r")
    assert not finished.ok
    assert "no engine with engine_id" in finished.error
