"""Reads a prefill engine's answer, and holds the lease of its KV blocks: who may pull them, and who
releases them if nobody does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import msgspec

from pdlaunch.http.watch.canary import CACHED_AT_PREFILL, num_recomputed
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import Chunk, blames
from pdlaunch.router.state import RouterState


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the result of prefill for one prompt."""

    engine: Engine
    params: dict[str, Any] | None
    """``kv_transfer_params`` for the decode engine; None: there are no blocks to pull."""
    has_first_tokens: bool
    """The params hold the first tokens, so that they need not come from decode."""
    open_choices: frozenset[int]  # choices that go on after their first token
    num_prompt_tokens: int
    usage: dict[str, Any] = {}
    report: Any = None  # the engine's spans, unparsed
    chunks: list[Chunk]  # the answer as the chunks of a stream

    @property
    def is_final(self) -> bool:
        """Return whether every choice ended with its first token, so that the answer is whole."""
        return not self.open_choices

    @property
    def lease_id(self) -> LeaseId | None:
        """Return the lease that the prefill engine holds; None when it holds none."""
        lease_id = None if self.params is None else self.params.get("remote_request_id")
        return LeaseId(lease_id) if isinstance(lease_id, str) else None

    def decode_params(self, engine: Engine, *, first_token_sent: bool) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` for ``engine``; None when it is to compute the prompt.

        Blocks are handed to decode engines. Others that stand in for them, the prefill engine too,
        get the first tokens alone.
        """
        if self.params is None or (engine.role != "decode" and not first_token_sent):
            return None
        if not first_token_sent:
            # With this field decode would report prefill's cached tokens, not its own pull.
            return {name: value for name, value in self.params.items() if name != CACHED_AT_PREFILL}
        ours = self.params["pdlaunch"] | {"first_token_sent": True}
        if engine.role != "decode":
            return {"do_remote_prefill": False, "do_remote_decode": False, "pdlaunch": ours}
        return self.params | {"pdlaunch": ours}


class HeldLease:
    """Holds the KV blocks of one prompt until a decode engine has pulled them."""

    def __init__(self, state: RouterState, handover: Handover) -> None:
        self.handover = handover
        self.is_taken = False
        self._state = state
        self._handed_over_at = state.now()
        self._lent = contextlib.ExitStack()
        """Keeps the prefill engine from being forgotten while its blocks may be read."""
        if handover.params is not None:
            self._lent.enter_context(handover.engine.lending())

    @property
    def prefill(self) -> Engine:
        return self.handover.engine

    def pulled(self) -> None:
        self.is_taken = True
        self._lent.close()

    def decode_params(self, engine: Engine, *, first_token_sent: bool) -> dict[str, Any] | None:
        """Return ``engine``'s ``kv_transfer_params``; None when it is to compute the prompt."""
        if engine.capabilities.needs_proof:
            if not self._may_hand_over(engine):
                return None
            # Even if the pull fails: another engine could read blocks that prefill has reused.
            self.is_taken = True
        # With an engine that verifies, the lease counts as taken only once decode has answered:
        # until then another engine may be handed the same blocks.
        return self.handover.decode_params(engine, first_token_sent=first_token_sent)

    def check_pulled(self, engine: Engine, chunk: Chunk) -> None:
        """Report a pair whose decode engine has computed a prompt although it got blocks."""
        if engine.capabilities.needs_proof:
            with blames(engine):
                num_tokens = num_recomputed(chunk)
            if num_tokens:
                self._state.recomputed(self.prefill, engine, num_tokens)

    def end(self, tried: Collection[EngineKey] = ()) -> None:
        """Release the blocks if nobody has pulled them.

        Some prefill engines listen only to decode engines: then one that was not ``tried`` tells
        them; without one the lease ends by itself.
        """
        self._lent.close()
        lease_id = self.handover.lease_id
        if lease_id is None or self.is_taken:
            return
        if not self.prefill.capabilities.needs_proof:
            self._state.release(self.prefill, lease_id)
            return
        # An engine that may not pull the blocks cannot release them either.
        decode = self._state.pool.pick_any(tried, can=self._may_hand_over)
        if decode is None:
            return
        params = self.handover.decode_params(decode, first_token_sent=False)
        if params is not None:
            self._state.metrics.count("releases")
            self._state.spawn(self._state.client.refuse_lease(decode, params))

    def _may_hand_over(self, decode: Engine) -> bool:
        """Return whether blocks of an engine that does not verify are safe to be read."""
        age_s = self._state.now() - self._handed_over_at
        lease_s = self.prefill.capabilities.lease_s
        return (
            not self.is_taken
            and (not lease_s or age_s < lease_s / 2)
            and self._state.pool.may_hand_over(self.prefill, decode)
        )


def read_handover(engine: Engine, raw: bytes, *, is_chat: bool) -> Handover:
    """Read a prefill engine's answer.

    Raises ValueError, RecursionError, LookupError, TypeError or AttributeError when it is not of
    the OpenAI form.
    """
    answer: dict[str, Any] = msgspec.json.decode(raw)
    report = answer.pop(REPORT_KEY, None)
    params = answer.get("kv_transfer_params") or None
    ours = None if params is None else params.get("pdlaunch")
    first_tokens = (ours or {}).get("first_tokens") or []
    open_choices = frozenset(
        choice["index"]
        for choice in answer["choices"]
        # An engine without first tokens has drawn one that nobody gets: decode draws all.
        if (ours is None and params is not None)
        or (
            choice["finish_reason"] in (None, "length") and not _ends(first_tokens, choice["index"])
        )
    )
    return Handover(
        engine=engine,
        params=params,
        has_first_tokens=bool(first_tokens),
        open_choices=open_choices,
        num_prompt_tokens=answer["usage"]["prompt_tokens"],
        usage=answer["usage"],
        report=report,
        chunks=chunks_of_answer(answer, is_chat=is_chat, open_choices=open_choices),
    )


def _ends(first_tokens: list[dict[str, Any]], choice: int) -> bool:
    return choice < len(first_tokens) and first_tokens[choice].get("finish_reason") is not None


def chunks_of_answer(
    answer: dict[str, Any], *, is_chat: bool, open_choices: Collection[int]
) -> list[Chunk]:
    """Return a whole answer as chunks of a stream.

    Choices in ``open_choices`` go on, so their finish_reason is left out.
    """
    head = {
        name: value
        for name, value in answer.items()
        if name not in ("choices", "kv_transfer_params", "object")
    }
    usage = head.pop("usage", None)
    chunks: list[Chunk] = [] if usage is None else [head | {"choices": [], "usage": usage}]
    for choice in answer["choices"]:
        if is_chat:
            message = choice.pop("message")
            chunks.append(
                head
                | {"choices": [_role_choice(choice["index"], message.get("role", "assistant"))]}
            )
            choice["delta"] = {
                name: value
                for name, value in message.items()
                if name != "role" and value not in (None, [])
            }
        if choice["index"] in open_choices:
            choice["finish_reason"] = None
        chunks.append(head | {"choices": [choice]})
    return chunks


def whole_chunk(answer: dict[str, Any]) -> Chunk:
    """Return a whole answer as one chunk, with all of its fields."""
    answer.pop("kv_transfer_params", None)
    for choice in answer["choices"]:
        if "message" in choice:
            choice["delta"] = choice.pop("message")
    return answer


def _role_choice(index: int, role: str) -> dict[str, Any]:
    return {
        "index": index,
        "delta": {"role": role, "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
