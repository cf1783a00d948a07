"""Holds pdlaunch's KV connector for vLLM, on top of ``pdlaunch.transfer``.

It runs in vLLM's processes, with vLLM's packages; ``connector`` alone imports vLLM::

    EngineCore   scheduler: which blocks to lend or pull ── commands, in vLLM's metadata ──┐
    workers      worker: a TransferThread for each, as a native rank has <─────────────────┘
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - vLLM up to 0.31 still runs on 3.10
    raise ImportError("pdlaunch's KV connector needs vLLM with Python 3.11 or newer")
