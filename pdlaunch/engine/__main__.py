"""Start a rank: ``python -m pdlaunch.engine --name NAME``, with a Bootstrap on standard input."""

from __future__ import annotations

import gc
import logging
import os

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.control import Failed
from pdlaunch.protocol.process.bootstrap import read_bootstrap

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the rank; leave by ``os._exit``, as a UCX finaliser of NIXL 1.5.1 crashes at exit."""
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level, form=bootstrap.log_format)
    # The libraries make 600,000 objects that stay: to search them for garbage again and again took
    # a fifth of the start. ``RankProcess.run`` turns the collector on.
    gc.disable()
    # Imported here so that the parent guard is up during the seconds that torch takes.
    from pdlaunch.engine.models.lean_imports import import_lean_transformers
    from pdlaunch.engine.models.tensor_parallel import says_that_a_rank_is_gone
    from pdlaunch.engine.rank import RankProcess

    # Not tried on a GPU yet, where libraries may want what it leaves out.
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
        # A traceback is for what nobody expected.
        expected = isinstance(error, PdlaunchError) or says_that_a_rank_is_gone(error)
        logger.error("rank failed: %s", text, exc_info=not expected)
        rank.control.send(Failed(error=text))
    rank.close()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
