"""Hosts and bundles that schedulers give a launch."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdlaunch.cli.joining import is_agent_task, with_placed_hosts
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.placement.ray_cluster import AgentActor, ray_bundles
from pdlaunch.launch.hosts.placement.slurm import slurm_hosts, slurm_join_file

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURMD_NODENAME": "n1",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for Slurm's own command, which knows the lists above."""
    command = tmp_path / "scontrol"
    command.write_text(
        '#!/bin/sh\ncase "$3" in "n[1-3]") echo n1; echo n2; echo n3;; *) echo "$3";; esac\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.processes
def test_the_nodes_of_a_step_are_hosts_the_supervisors_own_first(scontrol: None) -> None:
    assert [host.name for host in slurm_hosts(TASK)] == ["local", "n2", "n3"]
    with pytest.raises(ConfigError, match="6 tasks on 3 nodes"):
        slurm_hosts(TASK | {"SLURM_STEP_NUM_TASKS": "6"})


@pytest.mark.processes
def test_plans_are_made_for_the_nodes_of_an_allocation_and_nothing_is_started(
    scontrol: None,
) -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_PROCID": "0"}
    loaded = with_placed_hosts(load_config(None, {}, {"placement": "slurm"}), script)
    assert [host.name for host in loaded.config.hosts] == ["local", "n2", "n3"]
    with pytest.raises(ConfigError, match="SLURMD_NODENAME is not set"):
        is_agent_task(loaded.config, script)


@pytest.mark.parametrize(
    ("environ", "missing"),
    [({}, "SLURM_JOB_ID"), ({k: v for k, v in TASK.items() if "STEP" not in k}, "SLURM_STEP_ID")],
    ids=["no job", "the script of a job"],
)
def test_outside_of_a_step_the_fix_is_told(environ: dict[str, str], missing: str) -> None:
    loaded = load_config(None, {}, {"placement": "slurm"})
    with pytest.raises(ConfigError, match=f"{missing} is not set") as raised:
        with_placed_hosts(loaded, environ)
    assert "srun" in str(raised.value.fix)


def test_tasks_meet_at_a_file_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_config(None, {}, {"placement": "slurm"}).config
    assert slurm_join_file(config, TASK) == Path("/.pdlaunch-7.0.join.json")
    assert not is_agent_task(config, TASK)
    assert is_agent_task(config, TASK | {"SLURM_PROCID": "2"})


def test_a_bundle_of_ray_has_the_room_of_one_engine() -> None:
    flags = {"placement": "ray", "prefill.replicas": 2, "decode.tensor_parallel_size": 4}
    config = load_config(None, {}, flags).config
    bundles = ray_bundles(config, has_gpus=True)
    assert [(bundle.name, bundle.resources) for bundle in bundles] == [
        ("ray-prefill-0", {"CPU": 1, "GPU": 1}),
        ("ray-prefill-1", {"CPU": 1, "GPU": 1}),
        ("ray-decode-0", {"CPU": 4, "GPU": 4}),
    ]
    assert "GPU" not in ray_bundles(config)[0].resources


def test_each_host_of_an_engine_has_a_bundle_of_ray() -> None:
    flags = {"placement": "ray", "tensor_parallel_size": 8, "prefill.nnodes": 2}
    bundles = ray_bundles(load_config(None, {}, flags).config, has_gpus=True)
    assert [(bundle.name, bundle.num_gpus) for bundle in bundles] == [
        ("ray-prefill-0", 4),
        ("ray-prefill-1", 4),
        ("ray-decode-0", 8),
    ]


def test_agents_of_ray_allow_no_program_that_is_not_used() -> None:
    """One that a node lacks would end its agent."""
    config = load_config(None, {}, {"placement": "ray"}).config
    assert not any(bundle.executables for bundle in ray_bundles(config))


VLLM = {"engine": "vllm", "engine_command": "/opt/vllm/bin/vllm"}


def test_agents_of_ray_allow_the_program_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {}, {"placement": "ray"} | VLLM).config
    (bundle, _) = ray_bundles(config)
    assert bundle.executables == ("/opt/vllm/bin/vllm",)
    started: list[list[str]] = []

    def popen(command: list[str], **_: object) -> object:
        started.append(command)
        return SimpleNamespace(stdin=io.BytesIO())

    monkeypatch.setattr("pdlaunch.launch.hosts.placement.ray_cluster.subprocess.Popen", popen)
    for executables in (bundle.executables, ()):
        AgentActor(bundle.name, bundle.num_cpus, executables).start("tcp://a:1", "key")
    assert started[0][-2:] == ["--allow-executable", "/opt/vllm/bin/vllm"]
    assert "--allow-executable" not in started[1]
