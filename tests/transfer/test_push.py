"""Connectors whose holder writes: which requests are allowed, and how the end of a write is
proven.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from pdlaunch.bench.transfer import TransferOptions, bench_transfer
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import PullBegin, Push, Refused
from pdlaunch.protocol.transfer import PullDrained
from pdlaunch.transfer.connectors.connector import LocalMemory, new_connector
from pdlaunch.transfer.connectors.scratch import NUM_WARM_READS
from pdlaunch.transfer.regions import native_regions
from tests.transfer.fakes import Fabric, FakeConnector, FakeRead, layout_of, random_cache
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import cancel, grant, pull


class WrittenRead(FakeRead):
    """A READ that ends with the holder's answer."""

    target = b"target"

    def end(self, error: str) -> None:
        if error:
            self.fail()
        else:
            self.land()


class WritingConnector(FakeConnector):
    """Writes a scratch at once, and blocks when the test says so."""

    pushes = True
    read_class = WrittenRead

    def __init__(self, agent_name: str, fabric: Fabric) -> None:
        super().__init__(agent_name, fabric)
        self.writes: list[tuple[Any, Future[None]]] = []

    def push(self, target: bytes, blocks: Any, heads: range) -> Future[None]:
        write: Future[None] = Future()
        if blocks:
            self.writes.append(((target, blocks, heads), write))
        else:
            write.set_result(None)
        return write


class PushWorld(World):
    def turn(self, times: int = 2 * (1 + NUM_WARM_READS)) -> None:
        """By default enough turns for a handshake: each READ of a scratch takes two turns, one to
        request it and one to notice its end.
        """
        super().turn(times)

    @property
    def writes(self) -> list[tuple[Any, Future[None]]]:
        return self.holders["fake://1"].holder.connector.writes  # type: ignore[attr-defined]

    def end_write(self, *, ok: bool) -> None:
        _, write = self.writes.pop(0)
        if ok:
            write.set_result(None)
        else:
            write.set_exception(OSError("broken"))
        self.turn()


@pytest.fixture
def world() -> Iterator[PushWorld]:
    world = PushWorld(fabric=Fabric(stalled=True), new_connector=WritingConnector)
    yield world
    world.close()


def start_pull(world: PushWorld) -> HolderRank:
    holder = world.connect()
    holder.holder.grant(grant("r", [4, 5]))
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    return holder


def test_a_pull_ends_with_the_answer_of_the_holder_and_begins_again_after_a_failure(world) -> None:
    world.pull_with(pull_attempts=2)
    holder = start_pull(world)
    assert world.writes[0][0] == (b"target", [[4, 5]], range(3))
    assert not holder.holder.is_idle
    world.end_write(ok=False)
    assert not world.events
    world.clock.now += 1.0
    world.turn()
    world.end_write(ok=True)
    finished = world.finished()
    assert (finished.ok, finished.counts["kv_pull_retries"]) == (True, 1)
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def test_a_cancelled_pull_owns_its_blocks_until_the_answer(world) -> None:
    """This also holds after a reconnect: the new connection waits for the answer."""
    holder = start_pull(world)
    channel = holder.channel
    world.peers.peers[holder.identity.name].reconnect()
    world.pulls.cancel(cancel("p"))
    assert world.finished().in_flight
    world.clock.now += 60
    world.turn()
    assert (world.events, channel.closed, len(holder.channels)) == ([], False, 1)
    world.end_write(ok=False)
    assert world.events == [PullDrained(pull_id="p")]
    assert channel.closed
    world.clock.now += 60
    world.turn()
    assert len(holder.channels) == 2


def test_the_registry_alone_does_not_prove_that_a_write_is_over(world) -> None:
    holder = start_pull(world)
    world.peers.update([])
    world.turn()
    assert world.finished().in_flight
    world.turn()
    assert not world.events
    holder.channel.broken = True
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]


OF_PULL = {"call_id": 1, "engine_id": "1" * 32, "lease_id": "r", "reader": "reader"}
GOOD = {**OF_PULL, "block_ids": [[5, 4]], "first_head": 1, "num_heads": 2, "target": b""}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_id": "f" * 32}, "belongs to engine_id"),
        ({"lease_id": "other"}, "request other has no lease here"),
        ({"reader": "other"}, "reader other has no open pull"),
        ({"block_ids": [[4, 6]]}, "no lease for all of these blocks"),
        ({"block_ids": [[-1]]}, "no lease for all of these blocks"),
        ({"block_ids": [[4], [5]]}, "no lease for all of these blocks"),
        ({"first_head": 2}, "there are no 2 heads from 2 on"),
        ({"first_head": -1}, "there are no 2 heads from -1 on"),
        ({"num_heads": 0}, "there are no 0 heads from 1 on"),
        ({"num_heads": 2**63 - 1}, "there are no 9223372036854775807 heads from 1 on"),
    ],
)
def test_a_reader_gets_only_what_it_has_leased(world, changes, reason: str) -> None:
    holder = world.add()
    holder.holder.grant(grant("r", [4, 5]))
    holder.holder.ask(PullBegin(**OF_PULL, num_decode_ranks=1), Push(**GOOD))
    assert [job for job, _ in world.writes] == [(b"", [[5, 4]], range(1, 3))]
    (refused,) = holder.holder.ask(Push(**GOOD | changes))
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert len(world.writes) == 1


# Mooncake


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    settings = KVTransferSettings(connector="mooncake")
    connector = new_connector(settings, "prefill-0/rank-0", 1)
    memory = LocalMemory(
        native_regions(random_cache(layout_of(), 1, seed=0), layout_of()), torch.zeros(1)
    )
    with pytest.raises(
        TransferError,
        match=r"Mooncake cannot be imported: .* install mooncake-transfer-engine .*libibverbs1",
    ):
        connector.open(memory)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_transfer() -> None:
    """Every pull is verified by checksums; a failed pull raises."""
    mooncake = pytest.importorskip("mooncake.engine")
    if not mooncake.SUPPORT_CUDA:
        pytest.skip("this build of Mooncake has no CUDA")
    options = TransferOptions(
        paths=["mooncake"], num_blocks=[16], num_repeats=2, num_kv_heads=2, device="cuda"
    )
    assert float(bench_transfer(options)[0]["pull_gb_per_s"]) > 0
