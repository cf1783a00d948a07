from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.testing.simulated_run import MeasuredRow, compare, idle_engines, main
from pdlaunch.testing.simulator import SimRequest, Simulation
from tests.router.test_cost_model import costs


def status(*names: str) -> dict[str, Any]:
    roles = [name.partition("-")[0] for name in names]
    return {
        "engines": [
            {"name": name, "role": role, "costs": costs(role).named()}
            for name, role in zip(names, roles, strict=True)
        ]
    }


def a_run(slower: float = 1.0) -> dict[str, Any]:
    """A run on engines that are slower than they say."""
    engines = idle_engines(status("prefill-0", "decode-0"))
    for engine in engines:
        engine.speed = 1 / slower
    sent = [SimRequest(number, 0.0, 512, 32) for number in range(64)]
    Simulation(engines, LeastCost()).run(sent, concurrency=16)
    ttft_ms = sorted(request.ttft_s * 1000 for request in sent)
    return {
        "input_tokens": 512,
        "concurrency": 16,
        "num_requests": 64,
        "total_output_tokens": 64 * 32,
        "ttft_ms_median": statistics.median(ttft_ms),
        "ttft_ms_p99": ttft_ms[63],
        "itl_ms_median": statistics.median(
            gap_s * 1000 for request in sent for gap_s in request.gaps_s[1:]
        ),
        "output_tokens_per_s": 64 * 32 / max(request.tokens_at[-1] for request in sent),
        "errors": [],
    }


def test_a_run_as_the_costs_say_has_no_error_and_a_slower_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "status").write_text(json.dumps(status("prefill-0", "decode-0")))
    found = []
    for slower in (1.0, 2.0):
        (tmp_path / "report").write_text(json.dumps([a_run(slower)]))
        files = [str(tmp_path / name) for name in ("status", "report")]
        monkeypatch.setattr(sys, "argv", ["simulated_run", *files])
        main()
        *figures, mean = capsys.readouterr().out.splitlines()
        assert len(figures) == 4
        assert figures[0].startswith("512/32, 16 at once")
        found.append(int(mean.removeprefix("mean error ").removesuffix("%")))
    assert found[0] == 0
    assert 40 <= found[1] <= 80


def test_engines_without_costs_cannot_be_simulated() -> None:
    told = status("decode-0")
    told["engines"][0]["costs"] = None
    with pytest.raises(LookupError, match="decode-0 tells no costs"):
        compare(told, [MeasuredRow(**dict.fromkeys(MeasuredRow.__struct_fields__, 1))], LeastCost())
