"""The machines that commands judge: the flag ``--assume``, and ``pdlaunch probe``, which describes
this machine in JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pdlaunch import __version__
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.output import print_errors
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.machine_file import AssumedMachine, encode_machine, read_machine_file
from pdlaunch.machine.probe import probe_machine
from pdlaunch.machine.profiles import PROFILES, find_profile
from pdlaunch.planning.hosts import count_ranks

AssumeOption = Annotated[
    str | None,
    typer.Option(
        "--assume",
        metavar="MACHINE",
        help=(
            "Judge for another machine: a file of `pdlaunch probe`, or one of "
            f"{', '.join(PROFILES)} (also h100x2 and the like)."
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
    return Judged(probe_machine(), os.environ) if name is None else assumed(name, config)


def assumed(name: str, config: LaunchConfig) -> Judged:
    """Return the machine of a profile or a file. Raises ConfigError.

    Variables of this shell count as if they were set there, over those of the file.
    """
    found = find_profile(name, count_ranks(config))
    if found is None:
        path = Path(name)
        if not path.exists():
            raise ConfigError(
                f"{name[:80]!a} is neither a file nor one of {', '.join(PROFILES)}",
                field="--assume",
                value=name,
                fix="run `pdlaunch probe > machine.json` on the machine, and name that file",
            )
        found = read_machine_file(path)
    return Judged(found.machine, {**found.environ, **os.environ}, found)


def probe(assume: AssumeOption = None) -> None:
    """Print what this machine is: `pdlaunch probe > machine.json`, then `pdlaunch check-config
    --assume machine.json` anywhere. With --assume, print that machine, to change a fact by hand.

    It holds no secret and no name of the host; of the environment only variables that rules read
    (UCX_*, CUDA_VISIBLE_DEVICES, torch's allocator).
    """
    if assume is None:
        text = encode_machine(probe_machine(), os.environ, f"probed by pdlaunch {__version__}")
    else:
        try:
            judged = assumed(assume, LaunchConfig()).assumed
        except ConfigError as error:
            print_errors([error])
            raise typer.Exit(EXIT_UNUSABLE) from None
        assert judged is not None
        text = encode_machine(judged.machine, judged.environ, judged.about)
    sys.stdout.write(text)
