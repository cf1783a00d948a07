"""Tells a decode engine of a prompt while prefill still computes it.

::

    prefill   computes ────────── lease ──> first token ──> router ──> client
    decode    reads, hashes, waits ──┴─> pulls, computes ──> next tokens ──> router ──> client

So neither the prompt's way to decode nor the router's work stand between the first token and the
second. If decode fails before its first chunk, the request goes its usual way, as if nobody had
been told.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.protocol.kv_params import PdlaunchParams, to_wire
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine import Engine, Lender
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.engine_stream import EngineStream
from pdlaunch.router.leg import Leg

HEAD_START_S = 0.002
"""The prefill engine is told first: until it computes, each piece of work here would hold up the
first token.
"""


def early_hop_id(prompt: PromptRequest) -> HopId:
    """Return the id under which decode is told early."""
    return HopId(f"{prompt.hop_id}-early")


class EarlyDecode:
    """Keeps one request open to a decode engine that waits for ``lease_id``, until ``close``."""

    def __init__(
        self,
        engine: Engine,
        lender: Lender,
        prompt: PromptRequest,
        client: EngineClient,
        leg: Leg,
    ) -> None:
        self.engine = engine
        self.leg = leg
        self.lease_id = LeaseId(f"{prompt.hop_id}-{secrets.token_hex(4)}")
        """Unique at the prefill engine: the one of another attempt may still be there."""
        self._prompt = prompt
        self._client = client
        self._params = to_wire(lender.remote_kv(self.lease_id), PdlaunchParams(awaits_lease=True))
        self._stack = contextlib.AsyncExitStack()
        self._stack.enter_context(leg)
        self._stack.enter_context(
            engine.working(
                num_prompt_tokens=prompt.num_prompt_tokens, num_streams=prompt.num_choices
            )
        )
        self._opened = asyncio.ensure_future(self._open())

    async def stream(self) -> EngineStream:
        """Return the stream once it has begun. Raises EngineFailure, EngineRefusal."""
        return await self._opened

    async def close(self) -> None:
        """Abort the stream unless it has ended."""
        self._opened.cancel()
        await asyncio.wait([self._opened])
        if not self._opened.cancelled():
            self._opened.exception()
        # What it may have raised leads back to here by its traceback.
        del self._opened
        await self._stack.aclose()

    async def _open(self) -> EngineStream:
        await asyncio.sleep(HEAD_START_S)
        self.leg.sends()
        prompt = self._prompt
        headers = prompt.headers | {REQUEST_ID_HEADER: early_hop_id(prompt)}
        body = prompt.decode_body({"kv_transfer_params": self._params})
        return await self._stack.enter_async_context(
            self._client.stream(self.engine, prompt.endpoint.path, body, headers)
        )
