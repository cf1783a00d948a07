"""``kill -9`` of real holders: what they have leased is gone, and their memory is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.sockets import LaunchKeys, new_launch_keys
from pdlaunch.protocol.transfer import PullFinished
from tests.e2e.waiting import await_true
from tests.transfer.fakes import spec_of
from tests.transfer.rank_process import RankHandle, RankOptions, grant, pull

pytestmark = pytest.mark.processes

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
LARGE = {"num_layers": 64, "head_dim": 128}  # blocks of 6 MiB


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
                spec=spec_of(role, name=f"{role}-0", tp_size=tp_size, nixl={"path": path}),
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


def kv_files(rank: RankHandle) -> set[str]:
    """Inodes of the memory for KV blocks and scratch that a rank has mapped."""
    lines = Path(f"/proc/{rank.process.pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:pdlaunch-kv" in line}


def fail_to_pull(puller: RankHandle, holder: RankHandle) -> PullFinished:
    """Pull from a holder that the registry has dropped."""
    puller.call("registry", [puller.entry()])
    puller.submit(pull("p", holder.remote("r"), [9, 2, 6]))
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert not finished.in_flight
    return finished


@pytest.mark.parametrize("path", ["nixl", "p2p"])
def test_leases_die_with_their_rank(start: Start, path: str) -> None:
    holder, puller = start("prefill", path), start("decode", path)
    connect(puller, holder)
    holder.submit(grant("r", BLOCKS))
    left_behind = kv_files(holder)
    assert bool(left_behind & kv_files(puller)) == (path == "p2p")
    holder.stop()
    assert "no engine with engine_id" in fail_to_pull(puller, holder).error
    assert not left_behind & kv_files(puller), "the memory of the dead rank is unmapped"


@pytest.mark.parametrize("devices", gpus, ids="-".join)
def test_a_device_has_the_memory_of_a_dead_rank_back(
    start: Start, devices: tuple[str, str]
) -> None:
    """By the driver's own count. What else the reader takes there meanwhile, kernels and such, is
    far less than the KV cache.
    """
    puller = start("decode", "p2p", device=devices[1], **LARGE)
    assert puller.endpoint  # it has started, and has its own memory
    before = torch.cuda.mem_get_info(devices[0])[0]
    holder = start("prefill", "p2p", device=devices[0], num_blocks=512, **LARGE)
    connect(puller, holder)
    holder.submit(grant("r", BLOCKS))
    holder.blocks(BLOCKS)
    holder.stop()
    fail_to_pull(puller, holder)
    await_true(
        lambda: before - torch.cuda.mem_get_info(devices[0])[0] < GIB,
        "the memory of the dead rank is unmapped",
        30,
    )
