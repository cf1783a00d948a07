"""Entry of a rank process: ``python -m pdlaunch.engine --name prefill-0/rank-0`` with a Bootstrap on standard input."""

from __future__ import annotations

import logging
import os

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.process.bootstrap import read_bootstrap
from pdlaunch.protocol.control import Failed

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the rank; leaves by ``os._exit``, because a UCX finaliser crashes the interpreter's own exit (NIXL 1.5.1)."""
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level)
    # Imported here so that the parent guard is up during the seconds that torch takes.
    from pdlaunch.engine.rank import RankProcess

    rank = RankProcess(bootstrap)
    code = 0
    try:
        rank.run()
    except PdlaunchError as error:
        code = 1
        logger.error("rank failed: %s", error)
        rank.control.send(Failed(error=str(error)))
    except BaseException as error:
        code = 1
        logger.exception("rank failed")
        rank.control.send(Failed(error=f"{type(error).__name__}: {error}"))
    rank.close()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
