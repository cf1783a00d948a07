"""What a decode rank tells of its pulls."""

from __future__ import annotations

import msgspec

from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, pull


def test_reads_and_checksums_are_told(world: World, holder: HolderRank) -> None:
    holder.holder.grant(grant("r", [4, 5]))
    command = pull("p", holder.remote("r"), [1, 2])
    world.pulls.start(msgspec.structs.replace(command, records_spans=True))
    world.turn()
    (report,) = world.finished().reports.values()
    assert [span.name for span in report.spans] == ["read", "checksums"]
    read, checksums = report.spans
    assert read.attributes["bytes"] == 2 * holder.layout.block_bytes
    assert (read.attributes["source"], read.attributes["state"]) == ("prefill-0/rank-0", "done")
    assert checksums.attributes == {"source": "prefill-0/rank-0", "ok": True}
    assert 0 <= read.start_at <= read.end_at <= checksums.end_at <= report.elapsed_s


def test_wrong_bytes_are_told_and_the_second_read_too(world: World, holder: HolderRank) -> None:
    holder.holder.grant(grant("r", [4]))
    world.fabric.stalled = True
    command = pull("p", holder.remote("r"), [1])
    command = msgspec.structs.replace(command, records_spans=True, num_attempts=2)
    world.pulls.start(command)
    world.turn()
    right = holder.kv_cache.clone()
    holder.kv_cache.zero_()
    world.fabric.land()
    holder.kv_cache.copy_(right)
    world.fabric.stalled = False
    world.turn(8)
    finished = world.finished()
    assert finished.ok
    (report,) = finished.reports.values()
    assert [span.name for span in report.spans] == ["read", "checksums", "read", "checksums"]
    assert [span.attributes["ok"] for span in report.spans[1::2]] == [False, True]
