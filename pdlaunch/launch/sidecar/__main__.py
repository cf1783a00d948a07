"""Run one engine of vLLM: ``python -m pdlaunch.launch.sidecar --name NAME [OPTIONS] -- COMMAND``.

The supervisor starts it, with a Bootstrap on standard input that has the name too. ``COMMAND``
starts the engine. ``--exact``: a canary's tokens must be equal, as they are in float32.
``--unverified``: the engine has vLLM's own connector, for this reason.
"""

from __future__ import annotations

import argparse
import sys

from pdlaunch.http.lifecycle import Supervised, run_supervised
from pdlaunch.launch.sidecar.engine import guard_group
from pdlaunch.launch.sidecar.process import SidecarOptions, SidecarProcess


async def _serve(supervised: Supervised) -> None:
    own_end = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--unverified", default="")
    parser.add_argument("--hang-timeout", type=float, default=0.0)
    found = parser.parse_args(sys.argv[1:own_end])
    options = SidecarOptions(
        command=tuple(sys.argv[own_end + 1 :]),
        is_exact=found.exact,
        hang_timeout_s=found.hang_timeout,
        unverified=found.unverified,
    )
    await SidecarProcess(supervised, options).run()


if __name__ == "__main__":
    guard = guard_group()
    sys.exit(run_supervised(_serve))
