"""Finds the hosts of a launch in a Slurm allocation, with one task on each node.

::

    srun --ntasks-per-node 1 pdlaunch serve deployment.yaml --placement slurm
       task 0                 the supervisor, and engines on its node
       every other task       an agent, which joins with a file in a folder that all hosts share
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from pdlaunch.config.hosts import LOCAL, HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError

_TIMEOUT_S = 30.0
_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")


def is_supervisor(environ: Mapping[str, str]) -> bool:
    """Return True if this task runs the supervisor. Raises ConfigError outside of a step."""
    _require_step(environ)
    return environ["SLURM_PROCID"] == "0"


def slurm_hosts(environ: Mapping[str, str]) -> tuple[HostSettings, ...]:
    """Return the nodes of this step, the supervisor's node first. Raises ConfigError.

    Without a step (for plans), return the allocation's nodes; task 0 will run on the first.
    """
    if (nodes := environ.get("SLURM_JOB_NODELIST")) and "SLURM_STEP_ID" not in environ:
        _, *later = _expand(nodes)
        return (HostSettings(name=LOCAL), *(HostSettings(name=name) for name in later))
    _require_step(environ)
    # These variables include all components of a heterogeneous step.
    names = _expand(environ["SLURM_STEP_NODELIST"])
    num_tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    if num_tasks != len(names):
        raise ConfigError(
            f"Slurm runs {num_tasks} tasks on {len(names)} nodes, but pdlaunch needs one on each",
            field="placement",
            value="slurm",
            fix="srun --ntasks-per-node 1 pdlaunch serve ...",
        )
    own = environ["SLURMD_NODENAME"]
    others = [HostSettings(name=name) for name in dict.fromkeys(names) if name != own]
    return (HostSettings(name=LOCAL), *others)


def slurm_join_file(config: LaunchConfig, environ: Mapping[str, str]) -> Path:
    """Return the join file: as configured, else in the folder in which the step was started."""
    if config.join_file is not None:
        return Path(config.join_file).expanduser()
    step = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return Path.cwd() / f".pdlaunch-{step}.join.json"


def _require_step(environ: Mapping[str, str]) -> None:
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURMD_NODENAME", *_STEP)
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"this is not a task of Slurm: {missing[0]} is not set",
            field="placement",
            value="slurm",
            fix="start it with srun, inside an allocation of salloc or sbatch",
        )


def _expand(nodes: str) -> list[str]:
    """Return the node names in a list such as ``gpu[01-04,07]``. Raises ConfigError."""
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
            f"scontrol cannot list the nodes {nodes[:200]}: {error}",
            field="placement",
            value="slurm",
            fix="see that Slurm's commands are on PATH",
        ) from None
    return done.stdout.split()
