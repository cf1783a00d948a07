"""Runs as ``python -m pdlaunch.engine.server --name NAME``: the HTTP server of one engine.

The supervisor starts it, with a Bootstrap on standard input that has the name too.
"""

from __future__ import annotations

import os
import sys

from pdlaunch.engine.server.lifecycle import ServerProcess
from pdlaunch.http.lifecycle import run_supervised

if __name__ == "__main__":
    # One text at a time is encoded; a thread pool of the tokenizers library would only cost memory.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_supervised(lambda supervised: ServerProcess(supervised).run()))
