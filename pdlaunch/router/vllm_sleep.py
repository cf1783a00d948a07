"""Puts engines of vLLM to sleep, which would not wait for leases and tell no supervisor.

::

    hold: no new work ── nothing runs, no block is leased ── POST /sleep ── held until it is awake
    POST /wake_up ── its pairs are in doubt until new canaries come through ── given work again
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.watch.engine_api import Counts, is_vllm_busy
from pdlaunch.router.engine import Engine
from pdlaunch.router.state import RouterState

IDLE_TIMEOUT_S = 600.0
IDLE_POLL_S = 0.2
_DEFAULTS = (("level", "1"), ("mode", "wait"))
Query = Sequence[tuple[str, str]]


async def fall_asleep(state: RouterState, engine: Engine, query: Query) -> dict[str, Any]:
    """Put an engine to sleep; return the answer of a native engine.

    ``query``: ``level`` 1 or 2, ``mode`` wait or refuse. Raises RequestError, EngineFailure.
    """
    level, mode = (dict(query).get(name, default) for name, default in _DEFAULTS)
    if level not in ("1", "2") or mode not in ("wait", "refuse"):
        raise RequestError("level is 1 or 2, mode is wait or refuse", param="query")
    state.pool.hold(engine, "draining")
    is_asleep = False
    try:
        await _await_idle(state, engine, 0.0 if mode == "refuse" else IDLE_TIMEOUT_S)
        # What has come meanwhile, from others than this router, is waited for by vLLM.
        answer = await _call(state, engine, "/sleep", [("level", level), ("mode", "wait")])
        is_asleep = answer.get("status") == "sleeping"
    finally:
        if is_asleep:
            state.pool.hold(engine, "sleeping")
        else:
            state.pool.release(engine)
    # vLLM does not tell how much memory it has given back.
    return {"is_sleeping": is_asleep, "num_bytes": 0}


async def wake_up(state: RouterState, engine: Engine, query: Query) -> dict[str, Any]:
    """Wake an engine up, or its ``tags``; return a native engine's answer. Raises as above."""
    answer = await _call(state, engine, "/wake_up", query)
    is_awake = answer.get("status") == "awake"
    if is_awake:
        state.pool.release(engine)
        # Its memory may lie elsewhere now.
        for pair in state.pool.pairs:
            if engine.name in (pair.local, pair.peer):
                error = f"{engine.name} has slept"
                state.doubt(pair.local, pair.peer, pair.peer_incarnation, error)
    return {"is_sleeping": not is_awake, "num_bytes": 0}


async def _await_idle(state: RouterState, engine: Engine, timeout_s: float) -> None:
    """Return once it has nothing to do and lends nothing. Raises RequestError after a while."""
    until_at = state.now() + timeout_s
    while True:
        status, page, _ = await state.client.call(engine, "GET", "/metrics")
        # An error's page counts nothing, which is not to be taken for an engine at rest.
        if status != 200:
            raise _failed("/metrics", status, page)
        try:
            counts = Counts(page.decode())
        except ValueError:
            raise _failed("/metrics", status, page) from None
        if not engine.num_works and not is_vllm_busy(counts):
            return
        if state.now() >= until_at:
            raise RequestError(
                "requests run, or KV blocks are leased; mode=wait waits for them",
                status=409,
                code="engine_busy",
            )
        await asyncio.sleep(IDLE_POLL_S)


async def _call(state: RouterState, engine: Engine, path: str, query: Query) -> dict[str, Any]:
    status, body, _ = await state.client.call(engine, "POST", path, query)
    if status == 404:
        raise RequestError(
            "this engine cannot sleep: enable_sleep_mode is off", code="sleep_mode_off"
        )
    if status != 200:
        raise _failed(path, status, body)
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (ValueError, RecursionError):
        raise _failed(path, status, body) from None


def _failed(path: str, status: int, body: bytes) -> OverloadedError:
    return OverloadedError(
        f"{path} answered {status}: {body[:200]!r}", status=503, code="engine_failed"
    )
