"""Runs the HTTP server of one engine: ``python -m pdlaunch.engine.server --name NAME``.

The supervisor writes a Bootstrap to standard input. ``--name`` only marks the process in listings.
"""

import os
import sys

from pdlaunch.engine.server.lifecycle import ServerProcess
from pdlaunch.http.lifecycle import run_supervised

if __name__ == "__main__":
    # Texts are encoded one at a time, so threads of the tokenizers library would only cost memory.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_supervised(lambda supervised: ServerProcess(supervised).run()))
