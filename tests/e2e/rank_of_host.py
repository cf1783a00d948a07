"""A real rank on what it takes for a host of its own: ``--engine-id`` is what that host draws."""

from __future__ import annotations

import argparse
import logging
import os

from pdlaunch.engine.rank import RankProcess
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.process.bootstrap import read_bootstrap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--engine-id")
    options = parser.parse_args()
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level)
    rank = RankProcess(bootstrap, draw_engine_id=lambda: str(options.engine_id))
    rank.run()
    rank.close()
    logging.shutdown()
    os._exit(0)  # as every rank does


if __name__ == "__main__":
    main()
