"""What a rank hands to the peers that map its memory, and when it says that a lease is in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdlaunch.config.models import KVPath, KVTransferSettings
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import EndLease, LeaseEnded, LeaseGranted
from pdlaunch.transfer.connectors.opening import new_connector
from pdlaunch.transfer.departed import has_ended
from pdlaunch.transfer.faults import FaultPlan
from pdlaunch.transfer.faulty_connector import FaultyConnector
from pdlaunch.transfer.ledger import read_ledger
from pdlaunch.transfer.will import LEDGER_FILE, PROCESS_FILE
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.rank_process import grant
from tests.transfer.test_worker import Rank

AGENT = "prefill-0/rank-0#1"


class LendingConnector(FakeConnector):
    lends = True


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


@pytest.fixture
def rank(fabric: Fabric) -> Iterator[Rank]:
    context = SecureContext(new_launch_keys())
    rank = Rank(context, "prefill", LendingConnector(AGENT, fabric))
    rank.worker.wait_started(10)
    yield rank
    rank.worker.close(timeout_s=10)
    context.close()


def written(fabric: Fabric) -> list[str]:
    return [
        record.grant.request_id for record in read_ledger(fabric.agents[AGENT].files[LEDGER_FILE])
    ]


def test_a_lease_is_in_the_ledger_when_the_engine_hears_that_it_is_granted(
    rank: Rank, fabric: Fabric
) -> None:
    assert rank.worker.lends
    rank.worker.submit([grant("r", [4, 5])])
    assert rank.events() == [LeaseGranted(request_id="r")]
    assert written(fabric) == ["r"]
    rank.worker.submit([EndLease(request_id="r")])
    assert rank.events() == [LeaseEnded(request_id="r", reason="released")]
    assert written(fabric) == []


@pytest.mark.parametrize(("path", "lends"), [("nixl", False), ("p2p", True), ("auto", True)])
def test_where_memory_may_be_mapped_leases_are_written_down(path: KVPath, lends: bool) -> None:
    connector = new_connector(KVTransferSettings(path=path), "prefill-0/rank-0", 1)
    assert connector.lends is lends
    assert FaultyConnector(connector, FaultPlan(seed=1)).lends is lends


def test_a_rank_that_wakes_up_has_a_new_ledger(rank: Rank, fabric: Fabric) -> None:
    assert not has_ended(fabric.agents[AGENT].files[PROCESS_FILE])
    rank.worker.suspend(timeout_s=10)
    rank.worker.resume(timeout_s=10)
    rank.worker.submit([grant("r", [4])])
    assert rank.events() == [LeaseGranted(request_id="r")]
    assert written(fabric) == ["r"]
