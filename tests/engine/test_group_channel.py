"""The ranks of a group over hosts compute the same sums, and strangers have no part in them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq

from pdlaunch.engine import group_channel
from pdlaunch.engine.group_channel import (
    FollowerExchange,
    LeaderExchange,
    require_cpu,
)
from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.errors import StartupError, TransferError
from pdlaunch.protocol import sockets
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys

TP_SIZE = 3


@pytest.fixture
def context() -> Iterator[SecureContext]:
    with contextlib.closing(SecureContext(new_launch_keys())) as context:
        yield context


def on_all(context: SecureContext, work: Callable[[TPGroup], Any], address: str) -> list[Any]:
    """What ``work`` returns on each rank."""
    leader = LeaderExchange(context, address, address, TP_SIZE)
    results: dict[int, Any] = {}

    def rank(tp_rank: int) -> None:
        exchange = leader if not tp_rank else FollowerExchange(context, leader.endpoint, tp_rank)
        group = TPGroup(tp_rank, TP_SIZE, "cpu", None, exchange)
        results[tp_rank] = work(group)
        group.close()

    threads = [threading.Thread(target=rank, args=(tp_rank,)) for tp_rank in range(TP_SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[tp_rank] for tp_rank in range(TP_SIZE)]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_sum(context: SecureContext, dtype: torch.dtype, address: str) -> None:
    parts = [torch.randn(4, 5).to(dtype) for _ in range(TP_SIZE)]
    expected = (parts[0] + parts[1]) + parts[2]

    def work(group: TPGroup) -> torch.Tensor:
        tensor = parts[group.tp_rank].clone()
        assert group.all_reduce(tensor) is tensor
        return tensor

    for tensor in on_all(context, work, address):
        assert torch.equal(tensor, expected), "in the order of the ranks, to the last bit"


def test_calls_follow_each_other_however_fast_a_rank_is(context: SecureContext) -> None:
    def work(group: TPGroup) -> list[object]:
        mine = torch.tensor([group.tp_rank, 7])
        found: list[object] = [
            group.least(group.tp_rank + 5),
            group.broadcast(mine).tolist(),
            group.broadcast_bytes(b"id" if group.tp_rank == 0 else None),
        ]
        found.extend(group.all_reduce(torch.tensor([group.tp_rank + 1])).item() for _ in range(20))
        return found

    expected = [5, [0, 7], b"id", *[6] * 20]
    assert on_all(context, work, "127.0.0.1") == [expected] * TP_SIZE


def test_what_is_longer_than_a_frame_arrives_whole(
    context: SecureContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 MiB for each rank would be more memory than a test may take.
    monkeypatch.setattr(sockets, "MAX_FRAME_BYTES", 2**20)
    monkeypatch.setattr(group_channel, "_PIECE_BYTES", 2**19)
    shapes = [2**17, 2**17 + 1, 2**20, 3]
    parts = {shape: [torch.randn(shape) for _ in range(TP_SIZE)] for shape in shapes}

    def work(group: TPGroup) -> list[torch.Tensor]:
        sums = [group.all_reduce(parts[shape][group.tp_rank].clone()) for shape in shapes]
        return [*sums, group.broadcast(parts[2**20][group.tp_rank].clone())]

    expected = [(first + second) + third for first, second, third in parts.values()]
    for found in on_all(context, work, "127.0.0.1"):
        assert all(map(torch.equal, found, [*expected, parts[2**20][0]]))


def test_more_than_ranks_may_send_and_messages_of_another_form_are_refused(
    context: SecureContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_channel, "MAX_DATA_BYTES", 3)
    leader = LeaderExchange(context, "127.0.0.1", "127.0.0.1", 2)
    follower = FollowerExchange(context, leader.endpoint, 1)
    with pytest.raises(TransferError, match="at most 3 bytes at once, not 4: set a smaller"):
        follower.combine(b"1234", lambda parts: parts[0])
    for pieces in ([], [b"12", b"34"]):
        follower._socket.send_multipart([b"\1\0\0\0\1" + bytes(7), *pieces])
        with pytest.raises(TransferError, match=f"{len(pieces)} frames came from a rank"):
            leader.combine(b"", lambda parts: parts[-1])
    follower.close()
    leader.close()


def test_a_stranger_has_no_part_in_a_sum(context: SecureContext) -> None:
    leader = LeaderExchange(context, "127.0.0.1", "127.0.0.1", 2, timeout_s=0.2)
    with contextlib.closing(SecureContext(new_launch_keys())) as other:
        stranger = FollowerExchange(other, leader.endpoint, 1, timeout_s=0.1)
        plain = zmq.Context.instance().socket(zmq.DEALER)
        plain.connect(leader.endpoint)
        # One that is refused before it sends has no connection left, and would wait for one.
        with contextlib.suppress(zmq.Again):
            plain.send_multipart([b"\1\0\0\0\1" + bytes(7), b"forged"], zmq.NOBLOCK)
        with pytest.raises(TransferError, match="rank 0 of the TP group was silent"):
            stranger.combine(b"forged", lambda parts: parts[0])
        with pytest.raises(TransferError, match=r"ranks \[1\] of the TP group were silent"):
            leader.combine(b"", lambda parts: parts[-1])
        plain.close(linger=0)
        other.zmq.destroy(linger=0)  # what nobody reads
    leader.close()


def test_ranks_on_gpus_are_refused() -> None:
    require_cpu("cpu")
    with pytest.raises(StartupError, match="on cuda: NCCL's connections have no keys"):
        require_cpu("cuda")
