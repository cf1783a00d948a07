"""The id of one incarnation of an engine: drawn by every host, rank 0's counts for the TP group."""

from __future__ import annotations

import secrets

from pdlaunch.protocol.ids import EngineId

ENGINE_ID_BYTES = 16


def draw_engine_id() -> EngineId:
    """16 random bytes as 32 hex digits; rank 0's is broadcast over the TP group before a
    TransferWorker is made.
    """
    return EngineId(secrets.token_hex(ENGINE_ID_BYTES))
