"""A sidecar and the workers of its engine: who is up, which pairs of ranks are proven."""

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import StartupError
from pdlaunch.launch.sidecar.pairs import slowest
from pdlaunch.protocol.control import (
    PairReady,
    PairSuspect,
    Ready,
    Registry,
    SleepState,
)
from pdlaunch.protocol.engine_link import PullFailure
from pdlaunch.protocol.ids import EngineId, LeaseId
from pdlaunch.protocol.process.bootstrap import ConnectorSpec
from pdlaunch.protocol.transfer import GrantLease
from tests.launch.sidecar.fake_worker import FakeWorker, read_setup
from tests.launch.sidecar.test_process import FakeSupervisor, registry, watched
from tests.router.fake_engine import until

pytestmark = pytest.mark.processes
PREFILL_RANKS = ("tcp://10.0.0.2:7000", "tcp://10.0.0.2:7001")


class Scene:
    def __init__(
        self, supervisor: FakeSupervisor, workers: list[FakeWorker], running: asyncio.Task[None]
    ) -> None:
        self.supervisor = supervisor
        self.workers = workers
        self.running = running
        self.run_dir = supervisor.bootstrap.run_dir

    def registry(self, *pairs: PairReady, state: str = "ready") -> Registry:
        listed = registry(self.run_dir, *pairs, state=state)
        prefill, decode = listed.entries
        prefill = structs.replace(
            prefill,
            tp_size=2,
            engine_id=EngineId("prefill-0#1"),
            address=structs.replace(prefill.address, side_channels=PREFILL_RANKS),
        )
        return structs.replace(listed, entries=[prefill, decode])

    def learn(self, *pairs: PairReady, state: str = "ready") -> None:
        self.supervisor.inbox.put_nowait(self.registry(*pairs, state=state))

    async def prove_all(self) -> None:
        for worker in self.workers:
            for tp_rank in (0, 1):
                speed = 2.0 + worker.tp_rank - tp_rank
                await worker.prove(f"prefill-0/rank-{tp_rank}", speed, num_peers=2)


@asynccontextmanager
async def two_ranks(tmp_path: Path) -> AsyncIterator[Scene]:
    supervisor = FakeSupervisor(tmp_path)
    spec = ConnectorSpec(
        role="decode",
        bind_address="127.0.0.1",
        advertise_address="127.0.0.1",
        kv_transfer=KVTransferSettings().model_dump_json(),
        by_head=False,
        engine_id=EngineId("decode-0#1"),
    )
    supervisor.bootstrap = structs.replace(supervisor.bootstrap, connector=spec)
    path = tmp_path / "decode-0.kv.json"
    async with watched(supervisor) as running:
        await until(lambda: path.exists())
        workers = [FakeWorker(read_setup(path), tp_rank, 2) for tp_rank in (0, 1)]
        yield Scene(supervisor, workers, running)
        for worker in workers:
            worker.close()


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with two_ranks(tmp_path) as scene:
        for worker in scene.workers:
            await worker.be_up()
        await scene.supervisor.next(Ready)
        yield scene


async def test_it_is_ready_once_all_ranks_are_up_and_their_setup_is_for_this_user_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "decode-0.kv.json"
    async with two_ranks(tmp_path) as scene:
        supervisor = scene.supervisor
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        setup, keys = read_setup(path), supervisor.bootstrap.keys
        assert (setup.keys.public, setup.keys.secret) == (keys.public, keys.secret)
        assert setup.keys.http_token == ""
        assert KVTransferSettings.model_validate_json(setup.kv_transfer) == KVTransferSettings()
        await scene.workers[0].be_up()
        await until(lambda: any("1 of 2 ranks" in str(each) for each in supervisor.all_said))
        assert supervisor.registered[-1].side_channels == ()
        await scene.workers[1].be_up()
        await supervisor.next(Ready)
        assert supervisor.registered[-1].side_channels == (
            "tcp://127.0.0.1:7000",
            "tcp://127.0.0.1:7001",
        )
        assert supervisor.engine_ids[-1] == "decode-0#1"
    assert not path.exists()


async def test_ranks_of_different_starts_are_refused(tmp_path: Path) -> None:
    async with two_ranks(tmp_path) as scene:
        for worker, engine_id in zip(scene.workers, ("one", "two"), strict=True):
            await worker.be_up(engine_id)
        with pytest.raises(StartupError, match=r"engine_id must be decode-0#1, but rank . has"):
            await scene.running


async def test_workers_are_told_of_other_ranks_at_each_change(scene: Scene) -> None:
    scene.learn()
    told = [await worker.peers() for worker in scene.workers]
    assert told[0] == told[1]
    assert [
        (each.name, each.kind, each.engine, each.tp_rank, each.address.side_channel)
        for each in told[0]
    ] == [
        ("prefill-0/rank-0", "rank", "prefill-0", 0, PREFILL_RANKS[0]),
        ("prefill-0/rank-1", "rank", "prefill-0", 1, PREFILL_RANKS[1]),
    ]
    assert {(each.engine_id, each.incarnation, each.tp_size) for each in told[0]} == {
        ("prefill-0#1", 1, 2)
    }
    # Once more, for a worker that has connected again; nothing for one that knows it all.
    await scene.workers[0].be_up()
    assert await scene.workers[0].peers() == told[0]
    scene.supervisor.inbox.put_nowait(structs.replace(scene.registry(), entries=[]))
    assert [await worker.peers() for worker in scene.workers] == [[], []]


async def test_a_grant_of_the_scheduler_goes_to_all_ranks(scene: Scene) -> None:
    scheduler = FakeWorker(scene.workers[0].setup, is_scheduler=True)
    grant = GrantLease(
        lease_id=LeaseId("p"),
        block_ids=[[3, 1]],
        first_block_index=[0],
        block_hashes=[b"1", b"2"],
        num_tokens=8,
        num_readers=1,
        lease_s=30.0,
    )
    await scheduler.say(grant)
    assert [await worker.told() for worker in scene.workers] == [grant, grant]
    scheduler.close()


async def test_a_pair_is_told_once_all_ranks_and_a_canary_have_proven_it(scene: Scene) -> None:
    scene.learn()
    first, second = scene.workers
    for tp_rank in (0, 1):
        await first.prove(f"prefill-0/rank-{tp_rank}", num_peers=2)
    await second.prove("prefill-0/rank-0", num_peers=2)
    await asyncio.sleep(0.1)
    assert scene.supervisor.prefill.bodies == []
    await scene.prove_all()
    pair = await scene.supervisor.next(PairReady)
    assert (pair.local, pair.peer, pair.num_peers) == ("decode-0", "prefill-0", 1)
    assert (pair.path, pair.gigabytes_per_s) == ("p2p", 1.0)
    assert len(scene.supervisor.prefill.bodies) == 2


async def test_pulls_that_fail_are_a_doubt_of_their_pair_alone(scene: Scene) -> None:
    scene.learn()
    await scene.prove_all()
    scene.learn(await scene.supervisor.next(PairReady))
    for engine in ("of-an-engine-that-is-gone", "prefill-0", "prefill-0"):
        await scene.workers[0].say(PullFailure(peer_engine=engine, error="checksums differ"))
    doubt = await scene.supervisor.next(PairSuspect)
    assert (doubt.local, doubt.peer, doubt.peer_incarnation) == ("decode-0", "prefill-0", 1)
    assert "checksums differ" in doubt.error


async def test_a_rank_tells_that_its_memory_sleeps_before_vllm_answers(scene: Scene) -> None:
    await scene.workers[1].say(SleepState(state="sleeping"))
    assert (await scene.supervisor.next(SleepState)).state == "sleeping"


async def test_ranks_shake_hands_again_with_an_engine_that_has_slept(scene: Scene) -> None:
    scene.learn()
    await scene.prove_all()
    proven = await scene.supervisor.next(PairReady)
    scene.learn(proven)
    scene.learn(proven, state="sleeping")
    assert (await scene.supervisor.next(PairSuspect)).error == "prefill-0 sleeps"
    scene.learn()
    await asyncio.sleep(0.1)
    assert scene.supervisor.said.empty()
    await scene.prove_all()
    assert (await scene.supervisor.next(PairReady)).peer == "prefill-0"


async def test_handshakes_with_an_earlier_incarnation_prove_nothing(scene: Scene) -> None:
    prefill, decode = scene.registry().entries
    again = Registry(version=2, entries=[structs.replace(prefill, incarnation=2), decode])
    scene.supervisor.inbox.put_nowait(again)
    await scene.workers[0].peers()
    await scene.prove_all()
    await asyncio.sleep(0.1)
    assert scene.supervisor.prefill.bodies == []


def test_each_rank_needs_a_pair_with_each_rank_that_it_pulls_from() -> None:
    pair = PairReady(
        local="decode-0/rank-0", peer="prefill-0/rank-0", peer_incarnation=1, path="p2p"
    )
    assert slowest([pair], ["decode-0/rank-0"], 1) is pair
    assert slowest([pair], ["decode-0/rank-0"], 2) is None, "one of two data parallel ranks"
    assert slowest([pair], ["decode-0/rank-0", "decode-0/rank-1"], 1) is None, "rank 1 has none"
