from __future__ import annotations

import io

import pytest
import typer
from rich.console import Console

from pdlaunch.cli.preflight import judge_pairs, refuse_errors
from pdlaunch.config.sources import load_config
from pdlaunch.platform.facts import Gpu, Machine
from pdlaunch.protocol.control import PairReady
from pdlaunch.supervisor.states import Phase
from pdlaunch.supervisor.status import LaunchStatus

CPU = Machine(cpus=(0, 1), memory_bytes=64 * 1024**3)
GPUS = Machine(cpus=(0, 1), gpus=(Gpu(0), Gpu(1)))


def test_errors_are_printed_with_code_and_fix_and_refuse_the_start() -> None:
    console = Console(file=io.StringIO(), width=500)
    loaded = load_config(None, {}, {"enable_cumem_allocator": True, "device": "cpu"})
    with pytest.raises(typer.Exit) as raised:
        refuse_errors(loaded, CPU, {}, console)
    assert raised.value.exit_code == 1
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "error PD2" in text
    assert "cumem allocator is not supported on the current platform" in text
    assert "fix: " in text


@pytest.mark.parametrize(
    ("machine", "flags", "speed", "expected"),
    [
        (GPUS, {"enable_cumem_allocator": True}, 0.6, ["PD503"]),
        (GPUS, {"enable_cumem_allocator": True}, 300.0, []),
        (CPU, {}, 1000.0, []),
        (CPU, {}, 0.0001, ["PD504"]),
    ],
)
def test_measured_pairs_are_judged_with_the_allocator_of_the_launch(
    machine: Machine, flags: dict[str, object], speed: float, expected: list[str]
) -> None:
    loaded = load_config(None, {}, flags)
    pair = PairReady(
        local="decode-0/rank-0", peer="prefill-0/rank-0", peer_incarnation=1, seconds=0.1, path="nixl/UCX", gigabytes_per_s=speed
    )
    status = LaunchStatus(Phase.READY, (), pairs=(pair,))
    assert [finding.rule for finding in judge_pairs(loaded, machine, {}, status)] == expected
