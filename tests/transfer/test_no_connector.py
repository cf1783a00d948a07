"""The transfers of a rank without peers: it sleeps and wakes up alone, and a pull fails at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdlaunch.errors import TransferError
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import PullFinished
from pdlaunch.transfer.connectors.connector import PeerAgent
from pdlaunch.transfer.connectors.opening import NoConnector
from tests.transfer import test_thread
from tests.transfer.rank_process import pull
from tests.transfer.test_thread import Rank, remote

TIMEOUT_S = 60.0


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.setitem(test_thread.ENGINE_IDS, "both", "c" * 32)
    context = SecureContext(new_launch_keys())
    rank = Rank(context, "both", NoConnector("both-0/rank-0"))
    rank.transfer.wait_started(TIMEOUT_S)
    yield rank
    rank.transfer.close(timeout_s=10)
    context.close()


def test_it_waits_for_nobody_when_it_wakes_up(both: Rank) -> None:
    for _ in range(2):
        both.transfer.suspend(TIMEOUT_S)
        both.transfer.resume(TIMEOUT_S)
        while not both.transfer.connected:
            both._wakes.get(timeout=TIMEOUT_S)


def test_a_pull_fails_and_its_prompt_can_be_computed(both: Rank) -> None:
    both.transfer.submit([pull("p", remote("p"), [1, 2])])
    (finished,) = both.events()
    assert isinstance(finished, PullFinished)
    assert not finished.ok
    assert both.reports.empty(), "the supervisor hears of no pair"


def test_nobody_is_read() -> None:
    with pytest.raises(TransferError, match="both-0/rank-0 has no connector"):
        NoConnector("both-0/rank-0").connect(PeerAgent("x", b"", None))  # type: ignore[arg-type]
