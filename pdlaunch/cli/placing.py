"""Fills in the hosts that a scheduler gives a launch, and joins those of Slurm's other tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pdlaunch.cli.agent import introduction, serve_sessions
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.hosts.agent import allowed_executables
from pdlaunch.launch.hosts.join import read_ticket
from pdlaunch.launch.hosts.placement import slurm
from pdlaunch.launch.hosts.placement.ray_cluster import ray_bundles, ray_hosts
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.process.bootstrap import leave_ends_to_supervisor, raise_open_files

_LOOK_S = 0.5


def with_placed_hosts(loaded: LoadedConfig, environ: Mapping[str, str]) -> LoadedConfig:
    """Return a configuration that names the hosts of its launch. Raises ConfigError."""
    config = loaded.config
    match config.placement:
        case "ray":
            hosts = ray_hosts(ray_bundles(config))
        case "slurm":
            hosts = slurm.slurm_hosts(environ)
        case "local" | "hosts":
            return loaded
    # Ray has decided which engine goes where: each has a host of its own.
    strategy = "spread" if config.placement == "ray" else config.placement_strategy
    placed = {"hosts": hosts, "placement_strategy": strategy}
    return replace(loaded, config=config.model_copy(update=placed))


def is_agent_task(config: LaunchConfig, environ: Mapping[str, str]) -> bool:
    """Tell whether this is a task of Slurm that runs an agent. Raises ConfigError."""
    return config.placement == "slurm" and not slurm.is_supervisor(environ)


def serve_task(config: LaunchConfig, environ: Mapping[str, str], errors: Console) -> None:
    """Run the agent of this task until the supervisor's task is over.

    ``scancel`` and the end of the allocation signal every task: the supervisor drains and tells
    its agents to leave. Raises ConfigError and StartupError.
    """
    setup_logging("agent", "info")
    raise_open_files()
    path = slurm.slurm_join_file(config, environ)
    _await_file(path, config.join_timeout_s)
    leave_ends_to_supervisor()
    ticket = read_ticket(str(path))
    # Its own configuration names them: whoever has started this task starts them.
    executables = allowed_executables(config.engine_executables)
    join = introduction(ticket, slurm.node_name(environ), executables)
    reason = serve_sessions(ticket, join, executables, [], config.join_timeout_s, errors)
    errors.print(Text(f"left: {reason}"))


def _await_file(path: Path, timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > ends_at:
            raise StartupError(
                f"{path} has not come within {timeout_s:g} s (join_timeout_s): task 0 writes it; "
                "start the step in a folder that all nodes share, or name one with --join-file"
            )
        time.sleep(_LOOK_S)


def refuse_resume(config: LaunchConfig) -> None:
    """Raise ConfigError where agents do not outlive their supervisor."""
    if config.placement in ("ray", "slurm"):
        raise ConfigError(
            f"--resume finds agents that wait, and those of {config.placement} end with the launch",
            field="placement",
            value=config.placement,
            fix="leave --resume out",
        )
