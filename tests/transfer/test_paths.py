"""Ranks in processes of their own whose handshake chooses between NIXL and mapped memory, and
mapped memory that sleeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import psutil
import pytest

from pdlaunch.protocol.control import PairFailed, PairReady
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.protocol.transfer import PullFinished
from tests.e2e.waiting import await_true
from tests.transfer.fakes import spec_of
from tests.transfer.rank_process import TIMEOUT_S, RankHandle, RankOptions, grant, pull

pytestmark = pytest.mark.processes

Start = Callable[[str, str], RankHandle]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a rank of a role whose ``kv_transfer.nixl.path`` is as told."""
    keys, started = new_launch_keys(), []

    def start_rank(role: str, path: str) -> RankHandle:
        spec = spec_of(role, name=f"{role}-0", nixl={"path": path})
        started.append(
            RankHandle(
                RankOptions(
                    spec=spec, keys=keys, engine_id={"prefill": "a", "decode": "b"}[role] * 32
                )
            )
        )
        return started[-1]

    yield start_rank
    for rank in started:
        rank.stop()


def pull_once(puller: RankHandle, holder: RankHandle, name: str) -> None:
    holder.submit(grant(name, [3, 1, 4]))
    puller.submit(pull(name, holder.remote(name), [9, 2, 6]))
    finished = puller.event(PullFinished)
    assert finished.ok, finished.error
    np.testing.assert_array_equal(puller.blocks([9, 2, 6]), holder.blocks([3, 1, 4]))


def test_auto_times_both_paths_and_uses_one(start: Start) -> None:
    holder, puller = start("prefill", "auto"), start("decode", "auto")
    puller.call("registry", [holder.entry(), puller.entry()])
    ready = puller.report(PairReady)
    assert {ready.path, *ready.other_paths} == {"nixl/UCX", "p2p/memfd"}
    assert ready.gigabytes_per_s > 0
    assert all(said.endswith(" GB/s") for said in ready.other_paths.values())
    pull_once(puller, holder, "r")


def test_ranks_of_different_paths_do_not_fit(start: Start) -> None:
    """Only ranks of different launches can: their settings are equal within one."""
    holder, puller = start("prefill", "p2p"), start("decode", "nixl")
    puller.call("registry", [holder.entry(), puller.entry()])
    failed = puller.report(PairFailed)
    assert failed.fatal
    assert "connector: decode-0/rank-0 has 'nixl', prefill-0/rank-0 has 'p2p'" in failed.error


def test_mapped_memory_goes_before_a_rank_sleeps_and_is_mapped_anew_after(start: Start) -> None:
    holder, puller = start("prefill", "p2p"), start("decode", "p2p")
    entries = [holder.entry(), puller.entry()]
    puller.call("registry", entries)
    assert puller.report(PairReady).path == "p2p/memfd"
    pull_once(puller, holder, "before")
    holder.call("suspend", TIMEOUT_S)
    assert not holder.call("wait_unmapped", 0.0)
    puller.call("registry", [msgspec.structs.replace(entries[0], state="sleeping"), entries[1]])
    assert holder.call("wait_unmapped", TIMEOUT_S)
    holder.call("resume", TIMEOUT_S)
    puller.call("registry", entries)
    assert puller.report(PairReady).path == "p2p/memfd"
    pull_once(puller, holder, "after")


def test_ranks_that_sleep_ten_times_leave_no_files_open(start: Start) -> None:
    """NIXL by itself leaves a socket behind on both sides each time."""
    holder, puller = start("prefill", "nixl"), start("decode", "nixl")
    ranks, entries, most_fds = [holder, puller], [holder.entry(), puller.entry()], []
    processes = [psutil.Process(rank.process.pid) for rank in ranks]
    puller.call("registry", entries)
    assert puller.report(PairReady).path == "nixl/UCX"
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
        pull_once(puller, holder, f"round {round_index}")
        if round_index == 1:  # both have slept once
            most_fds = [process.num_fds() for process in processes]
    # The other side of a connection closes its end a moment later.
    await_true(
        lambda: all(
            process.num_fds() <= most for process, most in zip(processes, most_fds, strict=True)
        ),
        f"no more files than after the second round, {most_fds}",
    )
