"""The offload benchmark runs on a CPU; its figures are not looked at."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pdlaunch.bench.__main__ import main
from pdlaunch.bench.offload.copies import bench_offload
from pdlaunch.errors import ConfigError


def test_rows_for_each_block_size() -> None:
    torch.set_num_threads(1)
    report = bench_offload(block_sizes=(4096, 65536), device="cpu", num_bytes=256 * 1024)
    assert [row.block_bytes for row in report.rows] == [4096, 65536]
    for row in report.rows:
        assert row.rates.best_alone("load").name == "memcpy"
        assert min(row.methods.h2d, row.methods.both, row.handler.d2h, row.handler.both) > 0
        assert row.decode_slowdown is None
    assert min(report.limit.h2d, report.limit.d2h, report.limit.both) > 0


@pytest.mark.parametrize(
    ("block_sizes", "num_bytes", "message"),
    [
        ((4096, 5000), 8192, "5000 bytes are no multiple of 4096"),
        ((8192,), 4096, "4096 bytes are less than one block of 8192"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(
    block_sizes: tuple[int, ...], num_bytes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_offload(block_sizes=block_sizes, device="cpu", num_bytes=num_bytes)


def test_the_command_prints_a_report_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"block_sizes": [4096], "device": "cpu", "num_bytes": 16384}
    monkeypatch.setattr(sys, "argv", ["bench", "offload", json.dumps(arguments)])
    main()
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["num_bytes"], len(report["rows"])) == ("cpu", 16384, 1)
    assert (
        set(report["limit"])
        == {"h2d_gb_per_s", "d2h_gb_per_s", "both_gb_per_s"}
        < set(report["rows"][0])
    )
    monkeypatch.setattr(sys, "argv", ["bench", "offload", json.dumps(arguments | {"num_bytes": 1})])
    with pytest.raises(SystemExit, match="error: memory: 1 bytes"):
        main()
