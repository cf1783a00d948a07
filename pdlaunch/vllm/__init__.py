"""Holds pdlaunch's KV connector for vLLM, on top of ``pdlaunch.transfer``.

It runs in vLLM's processes, with vLLM's packages; ``connector`` alone imports vLLM::

    EngineCore   scheduler: which blocks to lend or pull ── commands, in vLLM's metadata ──┐
    workers      worker: a TransferThread for each, as a native rank has <─────────────────┘
"""
