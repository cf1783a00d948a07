"""``python -m pdlaunch.server --name NAME``: the HTTP server of one engine, started by the
supervisor.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.process.bootstrap import Bootstrap, read_bootstrap
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.server.lifecycle import ServerProcess

_log = logging.getLogger("pdlaunch.server")


def main() -> int:
    """Run until the supervisor says Stop; 1 when the start failed."""
    parser = argparse.ArgumentParser(prog="pdlaunch.server", description=__doc__)
    parser.add_argument(
        "--name",
        required=True,
        help="for people who look at the process list; the bootstrap has it too",
    )
    parser.parse_args()
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level)
    # One text at a time is encoded; a thread pool of the tokenizers library would only cost memory.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        asyncio.run(_serve(bootstrap))
    except PdlaunchError as error:
        _log.error("%s", error)
        return 1
    except Exception:
        _log.exception("the server failed")
        return 1
    return 0


async def _serve(bootstrap: Bootstrap) -> None:
    context = SecureContext(bootstrap.keys)
    try:
        await ServerProcess(bootstrap, context).run()
    finally:
        context.close()


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # The guard thread sits in a read of standard input, which the interpreter's own way out cannot
    # end.
    os._exit(status)
