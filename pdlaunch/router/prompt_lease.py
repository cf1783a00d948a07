"""Holds the lease of one prompt's KV blocks: who may pull them, and who releases them if nobody
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from pdlaunch.http.watch.canary import num_recomputed
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_errors import malformed_is_failure
from pdlaunch.router.engine_stream import Chunk
from pdlaunch.router.handed_prompts import HandedPrompt, HandedPrompts
from pdlaunch.router.handover import Handover
from pdlaunch.router.state import RouterState


class PromptLease:
    """Holds what prefill has handed over, until a decode engine has taken it."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self.handover: Handover | None = None
        """The answer of prefill; None before it."""
        self._handed_over_at = 0.0
        self._is_taken = False
        self._handed: tuple[HandedPrompts, HandedPrompt] | None = None
        """The book of the engine that was handed the blocks, and what it says of them."""
        self._lent = contextlib.ExitStack()
        """Keeps the prefill engine from being forgotten while its blocks may be read."""

    def hand_over(self, handover: Handover) -> None:
        """Take the answer of prefill."""
        self.handover = handover
        self._handed_over_at = self._state.now()
        if handover.params is not None:
            self._lent.enter_context(handover.engine.lending())

    @property
    def untaken_at(self) -> str:
        """Return the name of the engine whose blocks can still be pulled; empty: there are none."""
        return "" if self.handover is None or self._is_taken else self.handover.engine.name

    @property
    def holder(self) -> Engine | None:
        """Return the engine that has computed the prompt."""
        return None if self.handover is None else self.handover.engine

    def pulled(self) -> None:
        """Note that a decode engine has pulled the blocks."""
        self._is_taken = True
        self._lent.close()
        if self._handed is not None:
            book, prompt = self._handed
            book.answered(prompt)

    def decode_params(self, engine: Engine, *, first_token_sent: bool) -> dict[str, Any] | None:
        """Return ``engine``'s ``kv_transfer_params``; None when it is to compute the prompt."""
        if self.handover is None:
            return None
        if engine.capabilities.needs_proof:
            if not self._may_hand_over(self.handover.engine, engine):
                return None
            # Whatever comes of it: another one could read blocks that prefill has given away.
            self._is_taken = True
            prompt = engine.handed.hand(self.handover.engine.name, self.handover.num_prompt_tokens)
            self._handed = None if prompt is None else (engine.handed, prompt)
        # Of an engine that verifies the lease counts as taken only once decode has answered: until
        # then another one may be handed the same blocks.
        return self.handover.decode_params(engine, first_token_sent=first_token_sent)

    def path(self, decode: Engine) -> str | None:
        """Return how the blocks come to ``decode``; None before prefill has answered."""
        if self.handover is None:
            return None
        return self._state.pool.path(self.handover.engine, decode)

    def check_pulled(self, engine: Engine, chunk: Chunk) -> None:
        """Report a pair whose decode engine has computed what it was handed blocks of."""
        if self.handover is not None and engine.capabilities.needs_proof:
            with malformed_is_failure(engine):
                num_tokens = num_recomputed(chunk)
            if num_tokens:
                self._state.recomputed(self.handover.engine, engine, num_tokens)

    def end(self, tried: Collection[EngineKey] = ()) -> None:
        """Release the blocks if nobody has pulled them.

        A prefill engine that listens to nobody else is told by a decode engine that was not
        ``tried``; without one the lease ends by itself.
        """
        self._lent.close()
        handover = self.handover
        if handover is None or handover.lease_id is None or self._is_taken:
            return
        if not handover.engine.capabilities.needs_proof:
            self.release(handover.engine, handover.lease_id)
            return
        # An engine that the blocks may not be handed to could not speak of them either: without
        # another one the lease ends by itself.
        decode = self._state.pool.pick_any(
            tried, can=lambda engine: self._may_hand_over(handover.engine, engine)
        )
        if decode is None:
            return
        params = handover.decode_params(decode, first_token_sent=False)
        if params is not None:
            self._state.metrics.released()
            self._state.spawn(self._state.client.refuse_lease(decode, params))

    def release(self, engine: Engine, name: HopId | LeaseId) -> None:
        """Tell a prefill engine that nobody will pull, if it is one that listens."""
        if engine.capabilities.gives_first_token:
            self._state.metrics.released()
            self._state.spawn(self._state.client.release(engine, name))

    def _may_hand_over(self, prefill: Engine, decode: Engine) -> bool:
        """Tell whether blocks of an engine that does not verify are safe to be read."""
        age_s = self._state.now() - self._handed_over_at
        lease_s = prefill.capabilities.lease_s
        return (
            not self._is_taken
            and (not lease_s or age_s < lease_s / 2)
            and self._state.pool.may_hand_over(prefill, decode)
        )
