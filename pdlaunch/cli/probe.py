"""``pdlaunch probe``: describe this machine in JSON, for checks on another one."""

from __future__ import annotations

import os
import sys

import typer

from pdlaunch import __version__
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.assume import AssumeOption, assumed
from pdlaunch.cli.output import print_errors
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.machine.machine_file import encode_machine
from pdlaunch.machine.probe import probe_machine


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
