"""Runs a rank: ``python -m pdlaunch.engine --name NAME``, with a Bootstrap on standard input."""

import gc
import logging
import os

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.control import Failed
from pdlaunch.protocol.process.bootstrap import read_bootstrap

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the rank. Ends with ``os._exit``, as a UCX finaliser of NIXL 1.5.1 crashes otherwise."""
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level, form=bootstrap.log_format)
    # Imports create 600,000 objects that are never freed. Scanning these for garbage again and
    # again took a fifth of the start. ``RankProcess.run`` turns the collector on.
    gc.disable()
    # After ``read_bootstrap``, so that this process ends with its parent even while torch loads.
    from pdlaunch.engine.models.lean_imports import import_lean_transformers
    from pdlaunch.engine.models.tensor_parallel import says_that_a_rank_is_gone
    from pdlaunch.engine.rank import RankProcess

    # Untested on a GPU, where libraries may need the modules that this leaves out.
    if bootstrap.engine().device == "cpu":
        import_lean_transformers()
    rank = RankProcess(bootstrap)
    code = 0
    try:
        rank.run()
    except BaseException as error:
        code = 1
        text = (
            str(error) if isinstance(error, PdlaunchError) else f"{type(error).__name__}: {error}"
        )
        # Only unexpected errors get a traceback.
        expected = isinstance(error, PdlaunchError) or says_that_a_rank_is_gone(error)
        logger.error("rank failed: %s", text, exc_info=not expected)
        rank.control.send(Failed(error=text))
    rank.close()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
