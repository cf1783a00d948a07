"""Entry of the router process: ``python -m pdlaunch.router --name router`` with a Bootstrap on
standard input.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from pdlaunch.observe.logs import setup_logging
from pdlaunch.process.bootstrap import read_bootstrap
from pdlaunch.router.process import RouterProcess


def main() -> int:
    """Run the router until the supervisor says Stop; the exit code is 1 when it failed."""
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level)
    code = asyncio.run(RouterProcess(bootstrap).run())
    logging.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
