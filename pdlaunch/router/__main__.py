"""Runs as ``python -m pdlaunch.router --name router``: the router process.

The supervisor starts it, with a Bootstrap on standard input that has the name too.
"""

from __future__ import annotations

import sys

from pdlaunch.http.lifecycle import Supervised, run_supervised
from pdlaunch.router.process import RouterProcess


async def _serve(supervised: Supervised) -> None:
    await RouterProcess(supervised).run()


if __name__ == "__main__":
    sys.exit(run_supervised(_serve))
