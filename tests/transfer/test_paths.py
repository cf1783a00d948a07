"""Ranks in processes of their own whose handshake chooses between NIXL and mapped memory, and
mapped memory that sleeps.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import psutil
import pytest

from pdlaunch.protocol.control import PairFailed, PairReady
from tests.e2e.waiting import await_true
from tests.transfer.rank_process import TIMEOUT_S, RankHandle

pytestmark = pytest.mark.processes

Start = Callable[..., RankHandle]


def pair_of(start: Start, prefill: str, decode: str = "") -> list[RankHandle]:
    paths = {"prefill": prefill, "decode": decode or prefill}
    return [start(role, transfer={"nixl": {"path": path}}) for role, path in paths.items()]


def test_auto_times_both_paths_and_uses_one(start: Start) -> None:
    holder, puller = pair_of(start, "auto")
    (ready,) = puller.connect(holder)
    assert {ready.path, *ready.other_paths} == {"nixl/UCX", "p2p/memfd"}
    assert ready.gigabytes_per_s > 0
    assert all(said.endswith(" GB/s") for said in ready.other_paths.values())
    puller.pull_from(holder, "r")


def test_ranks_of_different_paths_do_not_fit(start: Start) -> None:
    """Only ranks of different launches can: their settings are equal within one."""
    holder, puller = pair_of(start, "p2p", "nixl")
    puller.call("registry", [holder.entry(), puller.entry()])
    failed = puller.report(PairFailed)
    assert failed.fatal
    assert "connector: decode-0/rank-0 has 'nixl', prefill-0/rank-0 has 'p2p'" in failed.error


def test_mapped_memory_goes_before_a_rank_sleeps_and_is_mapped_anew_after(start: Start) -> None:
    holder, puller = pair_of(start, "p2p")
    assert puller.connect(holder)[0].path == "p2p/memfd"
    puller.pull_from(holder, "before")
    holder.call("suspend", TIMEOUT_S)
    assert not holder.call("wait_unmapped", 0.0)
    asleep = msgspec.structs.replace(holder.entry(), state="sleeping")
    puller.call("registry", [asleep, puller.entry()])
    assert holder.call("wait_unmapped", TIMEOUT_S)
    holder.call("resume", TIMEOUT_S)
    assert puller.connect(holder)[0].path == "p2p/memfd"
    puller.pull_from(holder, "after")


def test_ranks_that_sleep_ten_times_leave_no_files_open(start: Start) -> None:
    """NIXL by itself leaves a socket behind on both sides each time."""
    ranks = holder, puller = pair_of(start, "nixl")
    entries, most_fds = [rank.entry() for rank in ranks], []
    processes = [psutil.Process(rank.process.pid) for rank in ranks]
    assert puller.connect(holder)[0].path == "nixl/UCX"
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
