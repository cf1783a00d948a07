"""Finds the hosts of a launch in an allocation of Slurm, one task on each.

::

    srun --ntasks-per-node 1 pdlaunch serve deployment.yaml --placement slurm
       task 0                 the supervisor, and engines beside it
       every other task       an agent, which joins by a file in a folder that all hosts share
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from pdlaunch.config.hosts import LOCAL, HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError

_TIMEOUT_S = 30.0
_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")


def is_supervisor(environ: Mapping[str, str]) -> bool:
    """Tell whether this is the task that runs the supervisor. Raises ConfigError."""
    _require_step(environ)
    return environ["SLURM_PROCID"] == "0"


def node_name(environ: Mapping[str, str]) -> str:
    """Return the name of this task's node, by which its agent joins."""
    return environ["SLURMD_NODENAME"]


def slurm_hosts(environ: Mapping[str, str]) -> tuple[HostSettings, ...]:
    """Return the nodes of this step, the supervisor's own first. Raises ConfigError.

    Without a step (for plans) these are the allocation's nodes; task 0 will get the first one.
    """
    if (nodes := environ.get("SLURM_JOB_NODELIST")) and "SLURM_STEP_ID" not in environ:
        _, *later = _expand(nodes)
        return (HostSettings(name=LOCAL), *(HostSettings(name=name) for name in later))
    _require_step(environ)
    # Of a heterogeneous step, too, these name all components.
    names = _expand(environ["SLURM_STEP_NODELIST"])
    num_tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    if num_tasks != len(names):
        raise ConfigError(
            f"Slurm runs {num_tasks} tasks on {len(names)} nodes, and pdlaunch needs one on each",
            field="placement",
            value="slurm",
            fix="srun --ntasks-per-node 1 pdlaunch serve ...",
        )
    own = environ["SLURMD_NODENAME"]
    others = [HostSettings(name=name) for name in dict.fromkeys(names) if name != own]
    return (HostSettings(name=LOCAL), *others)


def slurm_join_file(config: LaunchConfig, environ: Mapping[str, str]) -> Path:
    """Return the file by which agents join: in the folder that the step was started in."""
    if config.join_file is not None:
        return Path(config.join_file).expanduser()
    step = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return Path.cwd() / f".pdlaunch-{step}.join.json"


def _require_step(environ: Mapping[str, str]) -> None:
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURMD_NODENAME", *_STEP)
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"this is no task of Slurm: {missing[0]} is not set",
            field="placement",
            value="slurm",
            fix="start it with srun, inside an allocation of salloc or sbatch",
        )


def _expand(nodes: str) -> list[str]:
    """Return the names that a list such as ``gpu[01-04,07]`` stands for. Raises ConfigError."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"scontrol does not say which nodes {nodes[:200]} are: {error}",
            field="placement",
            value="slurm",
            fix="see that Slurm's commands are on PATH",
        ) from None
    return done.stdout.split()
