"""Ranks in processes of their own whose handshake chooses between NIXL and mapped memory, and
mapped memory that sleeps.
"""

from __future__ import annotations

import msgspec
import psutil
import pytest

from pdlaunch.protocol.control import PairReady
from tests.e2e.waiting import await_true
from tests.transfer.conftest import Start
from tests.transfer.rank_process import TIMEOUT_S, RankHandle

pytestmark = pytest.mark.processes


def pair_of(start: Start, prefill: str, decode: str = "") -> list[RankHandle]:
    paths = {"prefill": prefill, "decode": decode or prefill}
    return [start(role, transfer={"nixl": {"path": path}}) for role, path in paths.items()]


def test_auto_times_both_paths_and_uses_one(start: Start) -> None:
    holder, puller = pair_of(start, "auto")
    (ready,) = puller.connect(holder)
    assert {path.split()[0] for path in (ready.path, *ready.other_paths)} == {
        "nixl/UCX",
        "p2p/memfd",
    }
    assert ready.gigabytes_per_s > 0
    assert all(said.endswith(" GB/s") for said in ready.other_paths.values())
    puller.pull_from(holder, "r")


def test_ranks_that_sleep_ten_times_leave_no_files_open(start: Start) -> None:
    """NIXL by itself leaves a socket behind on both sides each time."""
    ranks = holder, puller = pair_of(start, "nixl")
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
    # The other side of a connection closes its end a moment later.
    await_true(
        lambda: all(
            process.num_fds() <= most for process, most in zip(processes, most_fds, strict=True)
        ),
        f"no more files than after the second round, {most_fds}",
    )
