"""A decode engine that is told of a prompt while prefill still computes it.

::

    prefill   computes ────────── lease ──> first token ──> router ──> client
    decode    reads, hashes, waits ──┴─> pulls, computes ──> next tokens ──> router ──> client

So neither the prompt's way to decode nor the router's work stand between the first token and the
second. What goes wrong with it before it has said anything is as if nobody had been told: the
request goes its usual way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.kv_params import PdlaunchParams, to_wire
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine_client import EngineClient, EngineStream
from pdlaunch.router.pool import Engine, EnginePool, Lender

HEAD_START_S = 0.002
"""The prefill engine is told first: until it computes, each piece of work here would hold up the
first token.
"""

MAX_QUEUED = 8
"""Prompts at work at the prefill engine: behind more of them a decode engine would wait for long,
and their time counts.
"""


class EarlyDecode:
    """One request to a decode engine that waits for ``lease_id``; somebody has to ``close`` it."""

    def __init__(
        self, engine: Engine, lender: Lender, prompt: PromptRequest, client: EngineClient
    ) -> None:
        self.engine = engine
        self.lease_id = LeaseId(f"{prompt.hop_id}-{secrets.token_hex(4)}")
        """Unique at the prefill engine: the one of another attempt may still be there."""
        self._prompt = prompt
        self._client = client
        self._params = to_wire(lender.remote_kv(self.lease_id), PdlaunchParams(awaits_lease=True))
        self._stack = contextlib.AsyncExitStack()
        self._stack.enter_context(
            engine.working(prompt_tokens=prompt.prompt_tokens, num_streams=prompt.num_choices)
        )
        self._opened = asyncio.ensure_future(self._open())

    async def stream(self) -> EngineStream:
        """The chunks after the first token, once there are any. Raises EngineFailure,
        EngineRefusal.
        """
        return await self._opened

    async def close(self) -> None:
        """Nobody listens any more; a stream that has not ended is aborted."""
        self._opened.cancel()
        await asyncio.wait([self._opened])
        if not self._opened.cancelled():
            self._opened.exception()
        await self._stack.aclose()

    async def _open(self) -> EngineStream:
        await asyncio.sleep(HEAD_START_S)
        prompt = self._prompt
        headers = prompt.headers | {REQUEST_ID_HEADER: f"{prompt.hop_id}-early"}
        body = prompt.decode_body({"kv_transfer_params": self._params})
        return await self._stack.enter_async_context(
            self._client.stream(self.engine, prompt.endpoint.path, body, headers)
        )


def tell_decode(
    prompt: PromptRequest, prefill: Engine, pool: EnginePool, client: EngineClient
) -> EarlyDecode | None:
    """Tell a decode engine of a prompt that ``prefill`` is about to get; None where that cannot be,
    or does not pay.
    """
    if (
        prompt.num_choices > 1
        or prefill.num_works > MAX_QUEUED
        or prefill.lender is None
        or not _can_wait(prefill)
    ):
        return None
    engine = pool.pick("decode", strict=True, needs=_can_wait)
    return None if engine is None else EarlyDecode(engine, prefill.lender, prompt, client)


def _can_wait(engine: Engine) -> bool:
    return engine.capabilities.awaits_lease
