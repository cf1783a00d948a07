"""Judges a launch before it starts, for this machine or that of ``--assume``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from pdlaunch.checks.probed import Probes
from pdlaunch.checks.run import run_checks
from pdlaunch.cli import EXIT_FAILED
from pdlaunch.cli.findings import say_finding
from pdlaunch.cli.joining import with_placed_hosts
from pdlaunch.cli.output import counted, say
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines import kind_of
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.probe import probe_machine
from pdlaunch.machine.profiles import PROFILES, AssumedMachine, find_machine
from pdlaunch.planning.plan import count_ranks
from pdlaunch.planning.resolve import ResolvedLaunch

_ASSUME = f"Judge for another machine: one of {', '.join(PROFILES)} (also h100x2 and similar)."
AssumeOption = Annotated[
    str | None, typer.Option("--assume", metavar="MACHINE", help=_ASSUME, show_default=False)
]


def judged_machine(name: str | None, config: LaunchConfig) -> tuple[Machine, AssumedMachine | None]:
    """Return the machine that ``--assume`` names, or this one and None. Raises ConfigError."""
    if name is None:
        return probe_machine(), None
    found = find_machine(name, count_ranks(config), "--assume")
    return found.machine, found


def load_launch(path: Path | None, flags: dict[str, object]) -> LoadedConfig:
    """Return the configuration of a launch, with its hosts. Raises ConfigError."""
    loaded = with_placed_hosts(load_config(path, os.environ, flags), os.environ)
    refuse_running_engines(loaded.config)
    return loaded


def refuse_running_engines(config: LaunchConfig) -> None:
    """Raise ConfigError for a configuration of ``pdlaunch router``, which launches no engines."""
    for field in ("engines", "engines_file"):
        if getattr(config, field):
            fix = f"run `pdlaunch router` with this configuration, or remove {field}"
            raise ConfigError("running engines cannot be part of a launch", field=field, fix=fix)


def refuse_errors(
    resolved: ResolvedLaunch,
    origins: Mapping[str, str],
    probes: Probes,
    *,
    strict: bool = False,
    undone: str = "not started",
) -> None:
    """Print warnings and errors of all rules; raise ``typer.Exit`` if there are errors. ``strict``:
    warnings count as errors. ``undone``: says which action is refused.
    """
    report = run_checks(resolved, origins, probes, rules=kind_of(resolved).rules())
    for finding in report.findings:
        if finding.severity != "info":
            say_finding(finding)
    if not report.is_ok(strict=strict):
        num_found = sum(each.severity != "info" for each in report.findings)
        number = num_found if strict else len(report.errors)
        errors = f"{counted(number, 'error')}{' (--strict)' * strict}"
        say(f"{undone}: {errors}; `pdlaunch explain CODE` says why", "red")
        raise typer.Exit(EXIT_FAILED)
