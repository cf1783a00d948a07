"""Injected faults: each does what its name says, and the same seed does the same again."""

from __future__ import annotations

import msgspec
import pytest
import torch
from pydantic import ValidationError

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import BlockRead, LocalMemory
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from pdlaunch.transfer.connectors.faulty import FaultyConnector
from pdlaunch.transfer.regions import native_regions
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


@pytest.mark.parametrize(
    ("fault", "is_late", "num_wrong_bytes"),
    [("REFUSE", False, None), ("DELAY", True, 0), ("LOSE", True, 0), ("CORRUPT", False, 1)],
)
def test_each_fault_does_what_its_name_says(fault, is_late, num_wrong_bytes):
    clock, fabric = FakeClock(), Fabric()
    holder, here = HolderRank(clock, fabric), random_cache(LAYOUT, 8, 2)
    plan = OneFault(seed=1, fault=fault, slow_s=3, lost_s=30)
    faulty = FaultyConnector(FakeConnector("puller", fabric), plan, clock)
    faulty.open(LocalMemory(native_regions(here, LAYOUT), torch.zeros(8, dtype=torch.uint8)))
    (peer,) = faulty.connect(holder.card).values()
    before, begun_at = here.clone(), clock.now
    if num_wrong_bytes is None:
        with pytest.raises(TransferError, match="injected"):
            peer.read(READ).poll()
        assert torch.equal(here, before)
        return
    read = peer.read(READ)
    while (state := read.poll()) == "pending":
        clock.now += 1
    read.release()
    found, wanted = here[[1, 2]].view(torch.uint8), holder.kv_cache[[5, 6]].view(torch.uint8)
    assert (state, clock.now > begun_at) == ("done", is_late)
    assert int((found != wanted).sum()) == num_wrong_bytes


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


@pytest.mark.parametrize("fields", [{"rat": 0.5}, {"inner": "faulty"}, {"inner": "nobody"}])
def test_a_plan_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        KVTransferSettings(connector="faulty", faulty=fields)


def test_what_faulty_wraps_decides_what_a_rank_needs():
    settings = KVTransferSettings(connector="faulty", nixl={"path": "nixl"})
    assert (settings.carrier, settings.carrier_settings.maps_memory) == ("nixl", False)
    assert KVTransferSettings(connector="faulty").carrier_settings.maps_memory
    with pytest.raises(ValidationError, match="needs kv_transfer"):
        KVTransferSettings(connector="faulty", faulty={"inner": "file"})
