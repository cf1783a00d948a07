"""Ranks as processes, with NIXL."""

from __future__ import annotations

import msgspec
import psutil
import pytest

from pdlaunch.protocol.control import PairReady
from tests.e2e.waiting import await_true
from tests.transfer.conftest import Start
from tests.transfer.rank_process import TIMEOUT_S

pytestmark = pytest.mark.processes


def test_ranks_that_sleep_ten_times_leave_no_files_open(start: Start) -> None:
    """Without our workaround, NIXL leaves a socket open on both sides each time."""
    ranks = holder, puller = [
        start(role, transfer={"nixl": {"path": "nixl"}}) for role in ("prefill", "decode")
    ]
    entries, most_fds = [rank.entry() for rank in ranks], []
    processes = [psutil.Process(rank.process.pid) for rank in ranks]
    assert puller.connect(holder)[0].path.startswith("nixl/UCX")
    for round_index in range(10):
        sleeper = round_index % 2
        ranks[sleeper].call("suspend", TIMEOUT_S)
        asleep = entries[:]
        asleep[sleeper] = msgspec.structs.replace(entries[sleeper], state="sleeping")
        for rank in ranks:
            rank.call("registry", asleep)
        ranks[sleeper].call("resume", TIMEOUT_S)
        for rank in ranks:
            rank.call("registry", entries)
        puller.report(PairReady)
        puller.pull_from(holder, f"round {round_index}")
        if round_index == 1:  # both have slept once
            most_fds = [process.num_fds() for process in processes]
    # The other side of a connection closes its end shortly after.
    await_true(
        lambda: all(
            process.num_fds() <= most for process, most in zip(processes, most_fds, strict=True)
        ),
        f"no more files than after the second round, {most_fds}",
    )
