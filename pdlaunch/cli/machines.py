"""The machines that commands judge: the flag ``--assume``, and ``pdlaunch probe``, which describes
this machine in JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from pdlaunch import __version__
from pdlaunch.cli.output import ending_at_errors
from pdlaunch.config.models import LaunchConfig
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.machine_file import AssumedMachine, encode_machine
from pdlaunch.machine.probe import probe_machine
from pdlaunch.machine.profiles import PROFILES, find_machine
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
    """Return the machine that ``--assume`` names, a profile or a file, else this one.

    Raises ConfigError.
    """
    if name is None:
        return Judged(probe_machine(), os.environ)
    found = find_machine(name, count_ranks(config), "--assume")
    # Variables of this shell count as if they were set there, over those of the file.
    return Judged(found.machine, {**found.environ, **os.environ}, found)


def probe(assume: AssumeOption = None) -> None:
    """Print what this machine is: `pdlaunch probe > machine.json`, then `pdlaunch check-config
    --assume machine.json` anywhere. With --assume, print that machine, to change a fact by hand.

    It holds no secret and no name of the host; of the environment only variables that rules read
    (UCX_*, CUDA_VISIBLE_DEVICES, torch's allocator).
    """
    with ending_at_errors():
        about = f"probed by pdlaunch {__version__}"
        judged = judged_machine(assume, LaunchConfig())
        if judged.assumed is not None:
            about = judged.assumed.about
        sys.stdout.write(encode_machine(judged.machine, judged.environ, about))
