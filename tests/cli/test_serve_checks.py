from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console

from pdlaunch.checks.probed import NixlAnswer
from pdlaunch.checks.rule import Finding
from pdlaunch.cli import preflight
from pdlaunch.cli.preflight import judge_pairs, refuse_errors
from pdlaunch.config.roles import Role
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.launch.status import LaunchPhase, LaunchStatus
from pdlaunch.machine.facts import Gpu, GpuLink, Machine
from pdlaunch.planning.resolve import ResolvedLaunch, resolve
from pdlaunch.protocol.control import PairReady
from tests.checks.contexts import CPU as HEALTHY
from tests.checks.contexts import TINY
from tests.config.model_files.files import tiny_gguf

CPU = Machine(num_cpus=2, memory_bytes=64 * 1024**3)
GPUS = Machine(num_cpus=2, gpus=(Gpu(0), Gpu(1)))
NVLINK = GpuLink(0, 1, "NVLink", 478.0, "18 NVLinks with 478 GB/s")
PCIE = GpuLink(0, 1, "PCIe", 63.0, "PCIe 5.0 x16 with 63 GB/s")


def joined_by(link: GpuLink | None) -> Machine:
    return replace(GPUS, gpu_links=() if link is None else (link,))


def resolved(loaded: LoadedConfig, machine: Machine) -> ResolvedLaunch:
    return resolve(loaded.config, {"here": machine}, {})


def judge(loaded: LoadedConfig, machine: Machine, status: LaunchStatus) -> tuple[Finding, ...]:
    return judge_pairs(resolved(loaded, machine), loaded.origins, status)


def measured(
    speed: float, path: str = "nixl/UCX", other_paths: dict[str, str] | None = None
) -> LaunchStatus:
    pair = PairReady(
        local="decode-0/rank-0",
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path=path,
        gigabytes_per_s=speed,
        other_paths=other_paths or {},
    )
    return LaunchStatus(LaunchPhase.READY, (), pairs=(pair,))


@pytest.mark.parametrize("given", [True, False])
def test_nixl_is_asked_only_about_variables_that_the_user_has_set(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_nixl(launch: ResolvedLaunch) -> dict[Role, NixlAnswer]:
        assert given, "it takes seconds"
        assert launch.roles["decode"].environment["UCX_RNDV_THRESH"] == "bogus"
        return {"decode": NixlAnswer(refusal="Invalid value for RNDV_THRESH: 'bogus'")}

    monkeypatch.setattr(preflight, "ask_nixl", ask_nixl)
    console = Console(file=io.StringIO(), width=500)
    environ = {"PDLAUNCH_ENV__UCX_RNDV_THRESH": "bogus"} if given else {}
    loaded = load_config(None, environ, {"device": "cpu", "load_format": "dummy"})
    with pytest.raises(typer.Exit) if given else contextlib.nullcontext():
        refuse_errors(resolved(loaded, HEALTHY), loaded.origins, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert ("error PD440 env.UCX_RNDV_THRESH" in text) is given


def test_errors_are_printed_with_code_and_fix_and_refuse_the_start() -> None:
    console = Console(file=io.StringIO(), width=500)
    loaded = load_config(None, {}, {"enable_cumem_allocator": True, "device": "cpu"})
    with pytest.raises(typer.Exit) as raised:
        refuse_errors(resolved(loaded, CPU), loaded.origins, console)
    assert raised.value.exit_code == 1
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "error PD2" in text
    assert "cumem allocator is not supported on the current platform" in text
    assert "fix: " in text


@pytest.mark.parametrize("kind", ["damaged .gguf", "pickles"])
def test_models_that_cannot_be_read_refuse_the_start_in_words(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    if kind == "pickles":
        model.mkdir()
        (model / "config.json").write_text(json.dumps(TINY))
        (model / "pytorch_model.bin").write_bytes(b"PK")
    else:
        model.write_bytes(tiny_gguf().encode()[:-1])
    console = Console(file=io.StringIO(), width=500)
    loaded = load_config(None, {}, {"model": str(model)})
    with pytest.raises(typer.Exit) as raised:
        refuse_errors(resolved(loaded, CPU), loaded.origins, console)
    assert raised.value.exit_code == 1
    assert isinstance(console.file, io.StringIO)
    problem, fix, *_, end = console.file.getvalue().splitlines()
    assert problem.startswith("error PD119 model" if kind == "pickles" else "error PD103 model")
    assert fix.startswith(
        "  fix: Convert them to safetensors"
        if kind == "pickles"
        else "  fix: Download the file again"
    )
    assert end.startswith("not started: ")


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
    findings = judge(loaded, machine, measured(speed))
    assert [finding.rule for finding in findings] == expected


@pytest.mark.parametrize(
    ("link", "speed", "flags", "expected"),
    [
        (NVLINK, 394.0, {}, []),
        (NVLINK, 250.0, {}, []),
        (NVLINK, 60.0, {}, ["PD504"]),
        (NVLINK, 10.4, {"kv_transfer.nixl.path": "nixl"}, ["PD504"]),
        (NVLINK, 0.6, {"kv_transfer.nixl.path": "nixl", "enable_cumem_allocator": True}, ["PD503"]),
        (NVLINK, 0.6, {}, ["PD504"]),
        (PCIE, 55.0, {}, []),
        (PCIE, 12.0, {}, ["PD504"]),
        (None, 0.6, {}, []),
        (NVLINK, 0.6, {"kv_transfer.connector": "mooncake"}, []),
        (NVLINK, 0.6, {"kv_transfer.connector": "file", "kv_transfer.file.directory": "/tmp"}, []),
        (NVLINK, 0.6, {"decode.device": "cpu"}, []),
        (NVLINK, 0.6, {"env": {"CUDA_VISIBLE_DEVICES": "1"}}, []),  # both on one GPU
        (NVLINK, 0.6, {"env": {"CUDA_VISIBLE_DEVICES": "1,0"}}, ["PD504"]),
        (NVLINK, 0.6, {"env": {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}}, []),
    ],
)
def test_pairs_of_gpus_are_judged_by_what_joins_them(
    link: GpuLink | None, speed: float, flags: dict[str, object], expected: list[str]
) -> None:
    findings = judge(load_config(None, {}, flags), joined_by(link), measured(speed))
    assert [finding.rule for finding in findings] == expected
