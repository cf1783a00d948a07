"""The benchmark runs on a CPU; figures are not looked at."""

from __future__ import annotations

import torch

from pdlaunch.offload.bench import bench_offload


def test_rows_for_each_block_size() -> None:
    torch.set_num_threads(1)
    report = bench_offload(block_sizes=(4096, 65536), device="cpu", num_bytes=256 * 1024)
    assert [row.block_bytes for row in report.rows] == [4096, 65536]
    assert all(row.chosen.load == "memcpy" and row.handler_both > 0 and row.decode_slowdown is None for row in report.rows)
    assert min(report.limit.h2d, report.limit.d2h, report.limit.both) > 0
