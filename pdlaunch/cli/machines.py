"""The machine that commands judge: this one, or that of the flag ``--assume``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from pdlaunch.config.models import LaunchConfig
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.probe import probe_machine
from pdlaunch.machine.profiles import PROFILES, AssumedMachine, find_machine
from pdlaunch.planning.hosts import count_ranks

AssumeOption = Annotated[
    str | None,
    typer.Option(
        "--assume",
        metavar="MACHINE",
        help=(
            f"Judge for another machine: one of {', '.join(PROFILES)} (also h100x2 and the like)."
        ),
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Judged:
    """Holds the machine that is judged, and the environment that processes would have there."""

    machine: Machine
    environ: Mapping[str, str]
    assumed: AssumedMachine | None = None  # none: it is this machine


def judged_machine(name: str | None, config: LaunchConfig) -> Judged:
    """Return the machine that ``--assume`` names, else this one. Raises ConfigError."""
    if name is None:
        return Judged(probe_machine(), os.environ)
    found = find_machine(name, count_ranks(config), "--assume")
    # Variables of this shell count as if they were set there.
    return Judged(found.machine, os.environ, found)
