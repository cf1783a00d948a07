"""Injected faults: each does what its name says, and the same seed does the same again."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest
import torch
from pydantic import ValidationError

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.transfer import EndLease
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    LocalMemory,
    ReadState,
    new_connector,
    rank_part,
)
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from pdlaunch.transfer.connectors.faulty import (
    FaultyConnector,
)
from pdlaunch.transfer.regions import native_regions
from pdlaunch.transfer.thread import TransferThread
from tests.transfer.fakes import Fabric, FakeClock, FakeConnector, layout_of, random_cache
from tests.transfer.pull_world import HolderRank
from tests.transfer.rank_process import grant

LAYOUT = layout_of()
READ = BlockRead([[1, 2]], [[5, 6]], range(3), range(3))


class OneFault(FaultPlan):
    """Every READ meets the same fault."""

    fault: str

    def of_read(self, agent, index):
        _, source = super().of_read(agent, index)
        return Fault[self.fault], source


class Pair:
    def __init__(self, plan: FaultPlan) -> None:
        self.clock, fabric = FakeClock(), Fabric()
        holder = HolderRank(self.clock, fabric)
        self.there, self.here = holder.kv_cache, random_cache(LAYOUT, 8, 2)
        self.faulty = FaultyConnector(FakeConnector("puller", fabric), plan, self.clock)
        self.faulty.open(
            LocalMemory(native_regions(self.here, LAYOUT), torch.zeros(8, dtype=torch.uint8))
        )
        (self.peer,) = self.faulty.connect(holder.card).values()

    def pull(self) -> list[ReadState]:
        """States of one READ, a second apart."""
        read = self.peer.read(READ)
        states = []
        while not states or states[-1] == "pending":
            states.append(read.poll())
            self.clock.now += 1
        read.release()
        return states

    def num_wrong_bytes(self) -> int:
        found, wanted = self.here[[1, 2]].view(torch.uint8), self.there[[5, 6]].view(torch.uint8)
        return int((found != wanted).sum())


def pair_with(fault: str) -> Pair:
    return Pair(OneFault(seed=1, fault=fault, slow_s=3, lost_s=30))


def test_a_refused_read_writes_nothing():
    pair = pair_with("REFUSE")
    before = pair.here.clone()
    with pytest.raises(TransferError, match="injected"):
        pair.pull()
    assert torch.equal(pair.here, before)


@pytest.mark.parametrize("fault", ["DELAY", "LOSE"])
def test_delayed_and_lost_reads_end_late_with_the_right_bytes(fault):
    pair = pair_with(fault)
    assert pair.pull()[-1] == "done"
    assert pair.clock.now > 1001
    assert pair.num_wrong_bytes() == 0


def test_a_corrupt_read_has_one_wrong_byte():
    pair = pair_with("CORRUPT")
    assert pair.pull() == ["done"]
    assert pair.num_wrong_bytes() == 1


def test_the_same_seed_injects_the_same_faults():
    def faults(seed: int) -> list[Fault | None]:
        return [FaultPlan(seed=seed, rate=0.5).of_read("agent", index)[0] for index in range(200)]

    assert faults(1) == faults(1) != faults(2)
    assert set(faults(1)) == {None, *Fault}


def test_some_leases_are_cut_short_and_nothing_else():
    plan = FaultPlan(seed=1, lease_rate=0.5, short_lease_s=0.1)
    commands = [grant(f"r{number}", [number]) for number in range(100)]
    changed = [plan.on_command("agent", command) for command in commands]
    assert 20 < sum(command.lease_s <= 0.1 for command in changed) < 80
    whole = [msgspec.structs.replace(each, lease_s=commands[0].lease_s) for each in changed]
    assert whole == commands
    end = EndLease(lease_id="r1")
    assert plan.on_command("agent", end) is end


@pytest.mark.parametrize("fields", [{"rat": 0.5}, {"inner": "faulty"}, {"inner": "nobody"}])
def test_a_plan_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        KVTransferSettings(connector="faulty", faulty=fields)


def test_what_faulty_wraps_decides_what_a_rank_needs():
    settings = KVTransferSettings(connector="faulty", nixl={"path": "nixl"})
    assert (settings.carrier, settings.carrier_settings.maps_memory) == ("nixl", False)
    assert "UCX_TLS" in settings.carrier_settings.environment({}, "cpu")
    assert KVTransferSettings(connector="faulty").carrier_settings.maps_memory
    with pytest.raises(ValidationError, match="needs kv_transfer"):
        KVTransferSettings(connector="faulty", faulty={"inner": "file"})
    again = KVTransferSettings.model_validate_json(settings.model_dump_json())
    assert again.section("faulty") == FaultPlan()
    assert isinstance(new_connector(again, "a", 1), FaultyConnector)
    assert isinstance(rank_part(TransferThread, again), partial)
    assert rank_part(TransferThread, KVTransferSettings()) is TransferThread
