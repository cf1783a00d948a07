"""Injected faults: each does what its name says, and the same seed does the same again."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest
import torch
from pydantic import ValidationError

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.protocol.transfer import EndLease
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    PushedRead,
    Read,
    ReadState,
)
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from pdlaunch.transfer.connectors.faulty import (
    FaultyConnection,
    FaultyConnector,
    FaultyPushedRead,
    FaultyRead,
)
from pdlaunch.transfer.connectors.opening import new_connector, rank_part
from pdlaunch.transfer.thread import TransferThread
from tests.transfer.fakes import Fabric, FakeClock, FakeConnector, layout_of, random_cache
from tests.transfer.rank_process import grant

LAYOUT = layout_of()
READ = BlockRead([1, 2], [5, 6], range(3), range(3))


class OneFault(FaultPlan):
    """Every READ meets the same fault."""

    fault: str

    def of_read(self, agent, index):
        _, source = super().of_read(agent, index)
        return Fault[self.fault], source


class Pair:
    def __init__(self, plan: FaultPlan) -> None:
        self.clock, self.fabric = FakeClock(), Fabric()
        holder = FakeConnector("holder", self.fabric)
        self.there, self.here = random_cache(LAYOUT, 8, 1), random_cache(LAYOUT, 8, 2)
        holder.open(LocalMemory(self.there, torch.zeros(8, dtype=torch.uint8), LAYOUT))
        self.faulty = FaultyConnector(FakeConnector("puller", self.fabric), plan, self.clock)
        self.faulty.open(LocalMemory(self.here, torch.zeros(8, dtype=torch.uint8), LAYOUT))
        geometry = Geometry(0, 8, 1, 1, 3, 0, 0, 0, 8)
        self.peer = self.faulty.connect(PeerAgent("holder", b"holder", geometry))

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
        return int(
            (self.here[[1, 2]].view(torch.uint8) != self.there[[5, 6]].view(torch.uint8)).sum()
        )


def pair_with(fault: str) -> Pair:
    return Pair(OneFault(seed=1, fault=fault, slow_s=3, lost_s=30))


def test_a_refused_read_writes_nothing():
    pair = pair_with("REFUSE")
    before = pair.here.clone()
    with pytest.raises(TransferError, match="injected"):
        pair.pull()
    assert torch.equal(pair.here, before)


def test_delayed_and_lost_reads_end_late_with_the_right_bytes():
    for fault in ("DELAY", "LOSE"):
        pair = pair_with(fault)
        assert pair.pull()[-1] == "done"
        assert pair.clock.now > 1001
        assert pair.num_wrong_bytes() == 0


def test_a_corrupt_read_has_one_wrong_byte():
    pair = pair_with("CORRUPT")
    assert pair.pull() == ["done"]
    assert pair.num_wrong_bytes() == 1


def test_a_truncated_read_lacks_the_second_half_of_its_last_block():
    pair = pair_with("TRUNCATE")
    before = pair.here.clone()
    assert pair.pull() == ["done"]
    heads, half = (3, LAYOUT.head_bytes // 4), LAYOUT.head_bytes // 8
    assert torch.equal(pair.here[2].view(heads)[:, half:], before[2].view(heads)[:, half:])
    assert torch.equal(pair.here[2].view(heads)[:, :half], pair.there[6].view(heads)[:, :half])


def test_the_same_seed_injects_the_same_faults():
    def faults(seed: int) -> list[Fault | None]:
        return [FaultPlan(seed=seed, rate=0.5).of_read("agent", index)[0] for index in range(200)]

    assert faults(1) == faults(1) != faults(2)
    assert set(faults(1)) == {None, *Fault}


def test_one_fault_alone_and_only_while_a_file_exists(tmp_path):
    switch = tmp_path / "on"
    plan = FaultPlan(rate=1, only="CORRUPT", reads_file=str(switch))
    assert plan.of_read("agent", 1)[0] is None
    switch.touch()
    assert {plan.of_read("agent", index)[0] for index in range(50)} == {Fault.CORRUPT}


def test_some_leases_are_cut_short_and_nothing_else():
    plan = FaultPlan(seed=1, lease_rate=0.5, short_lease_s=0.1)
    commands = [grant(f"r{number}", [number]) for number in range(100)]
    changed = plan.on_commands("agent", [*commands, EndLease(lease_id="r1")])
    short = [command for command in changed[:-1] if command.lease_s <= 0.1]
    assert 20 < len(short) < 80
    assert [
        msgspec.structs.replace(command, lease_s=commands[0].lease_s) for command in changed[:-1]
    ] == commands
    assert changed[-1] == EndLease(lease_id="r1")


def public_names(kind: type) -> set[str]:
    """Methods, properties and attributes that a class itself declares."""
    names = {*vars(kind), *getattr(kind, "__annotations__", {})}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("interface", "wrapper"),
    [
        (Connector, FaultyConnector),
        (Connection, FaultyConnection),
        (Read, FaultyRead),
        (PushedRead, FaultyPushedRead),
    ],
)
def test_the_wrapper_forgets_no_method(interface, wrapper):
    """An inherited default would hide what the inner connector does; its pusher and its mapper are
    handed out themselves.
    """
    own = public_names(wrapper) | set(vars(Pair(FaultPlan(rate=0)).faulty))
    assert public_names(interface)
    assert public_names(interface) - own == set()


@pytest.mark.parametrize(
    "fields", [{"rat": 0.5}, {"only": "corrupt"}, {"inner": "faulty"}, {"inner": "nobody"}]
)
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
