"""Reads a prefill engine's answer, and holds the lease of its KV blocks: who may pull them, and who
releases them if nobody does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from pdlaunch.http.watch.canary import CACHED_AT_PREFILL, num_recomputed
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import Chunk, blames, refuse_broken
from pdlaunch.router.state import RouterState


class Handover:
    """Holds what prefill has computed of one prompt, and its KV blocks until they are pulled.

    ``params``: the ``kv_transfer_params`` for the decode engine; None: there are no blocks to pull.
    ``chunks``: the answer as the chunks of a stream.
    """

    def __init__(self, state: RouterState, engine: Engine, raw: bytes, *, is_chat: bool) -> None:
        """Read ``engine``'s answer.

        Raises ValueError, RecursionError, LookupError, TypeError or AttributeError when it is not
        of the OpenAI form, and EngineFailure when the engine gave up.
        """
        answer: dict[str, Any] = msgspec.json.decode(raw)
        self.engine = engine
        self.report: object = answer.pop(REPORT_KEY, None)  # the engine's spans
        self.usage: dict[str, Any] = answer["usage"]
        self.num_prompt_tokens: int = self.usage["prompt_tokens"]
        self.params: dict[str, Any] | None = answer.get("kv_transfer_params") or None
        ours = None if self.params is None else self.params.get("pdlaunch")
        first_tokens = (ours or {}).get("first_tokens") or []
        ended = {
            choice
            for choice, token in enumerate(first_tokens)
            if token.get("finish_reason") is not None
        }
        # The params hold the first tokens, so that they need not come from decode.
        self.has_first_tokens = bool(first_tokens)
        open_choices = frozenset(
            choice["index"]
            for choice in answer["choices"]
            # An engine without first tokens has drawn one that nobody gets: decode draws all.
            if (ours is None and self.params is not None)
            or (choice["finish_reason"] in (None, "length") and choice["index"] not in ended)
        )
        self.is_final = not open_choices  # every choice ended with its first token
        self.chunks = chunks_of_answer(answer, is_chat=is_chat, open_choices=open_choices)
        for chunk in self.chunks:
            refuse_broken(engine, chunk)
        self.is_taken = False
        self._state = state
        self._handed_over_at = state.now()
        self._answered_at = self._handed_over_at  # when decode began its answer
        # Keeps the prefill engine from being forgotten while its blocks may be read.
        self._is_counted = self.params is not None
        engine.num_leases += self._is_counted

    def pulled(self) -> None:
        self.is_taken = True
        self._answered_at = self._state.now()
        self._uncount()

    def decode_params(self, engine: Engine) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` for ``engine``; None when it is to compute the prompt.

        Blocks are handed to decode engines. Others that stand in for them, the prefill engine too,
        get the first tokens alone.
        """
        if engine.capabilities.is_vllm:
            if not self._may_hand_over(engine):
                return None
            # Even if the pull fails: another engine could read blocks that prefill has reused. If
            # the engine verifies, blocks count as taken only once decode has answered.
            self.is_taken = True
        if self.params is None or (engine.role != "decode" and not self.has_first_tokens):
            return None
        if not self.has_first_tokens:
            # With this field decode would report prefill's cached tokens, not its own pull.
            return {name: value for name, value in self.params.items() if name != CACHED_AT_PREFILL}
        # The client has the first tokens from prefill, so decode must not send them again.
        ours = self.params["pdlaunch"] | {"first_token_sent": True}
        if engine.role != "decode":
            return {"do_remote_prefill": False, "do_remote_decode": False, "pdlaunch": ours}
        return self.params | {"pdlaunch": ours}

    def check_pulled(self, engine: Engine, chunk: Chunk) -> None:
        """Report a pair whose decode engine has computed a prompt although it got blocks."""
        if engine.capabilities.is_vllm:
            with blames(engine):
                num_tokens = num_recomputed(chunk)
            if num_tokens:
                lease_s = self.engine.capabilities.lease_s
                waited_s = self._answered_at - self._handed_over_at
                # A request may wait in decode for longer than its lease: the pair is all right.
                is_in_doubt = not lease_s or waited_s < lease_s
                self._state.recomputed(self.engine, engine, num_tokens, is_in_doubt=is_in_doubt)

    def end(self, tried: Collection[EngineKey] = ()) -> None:
        """Release the blocks if nobody has pulled them.

        Some prefill engines listen only to decode engines: then one that was not ``tried`` tells
        them; without one the lease ends by itself.
        """
        self._uncount()
        lease_id = None if self.params is None else self.params.get("remote_request_id")
        if not isinstance(lease_id, str) or self.is_taken:
            return
        if not self.engine.capabilities.is_vllm:
            self._state.release(self.engine, LeaseId(lease_id))
            return
        # An engine that may not pull the blocks cannot release them either.
        decode = self._state.pool.pick_any(tried, can=self._may_hand_over)
        if decode is None:
            return
        params = self.decode_params(decode)
        if params is not None:
            self._state.metrics.count("releases")
            # vLLM has prefill free the blocks of a request that it refuses, as it does a beam
            # search that is streamed, before it computes anything.
            refused = {"prompt": [0], "max_tokens": 1, "stream": True, "use_beam_search": True}
            refused["kv_transfer_params"] = params
            self._state.spawn(self._state.client.tell(decode, "/v1/completions", refused))

    def _uncount(self) -> None:
        self.engine.num_leases -= self._is_counted
        self._is_counted = False

    def _may_hand_over(self, decode: Engine) -> bool:
        """Return whether blocks of an engine that does not verify are safe to be read."""
        age_s = self._state.now() - self._handed_over_at
        lease_s = self.engine.capabilities.lease_s
        return (
            not self.is_taken
            and (not lease_s or age_s < lease_s / 2)
            and self._state.pool.may_hand_over(self.engine, decode)
        )


def chunks_of_answer(
    answer: dict[str, Any], *, is_chat: bool, open_choices: Collection[int]
) -> list[Chunk]:
    """Return a whole answer as chunks of a stream.

    Choices in ``open_choices`` go on, so their finish_reason is left out.
    """
    apart = ("choices", "kv_transfer_params", "object", "usage")
    head = {name: value for name, value in answer.items() if name not in apart}
    usage = answer.get("usage")
    chunks: list[Chunk] = [] if usage is None else [head | {"choices": [], "usage": usage}]
    for choice in answer["choices"]:
        if is_chat:
            message = choice.pop("message")
            role = {"role": message.pop("role", "assistant"), "content": ""}
            opening = {"index": choice["index"], "delta": role, "logprobs": None}
            chunks.append(head | {"choices": [opening | {"finish_reason": None}]})
            told = {name: value for name, value in message.items() if value not in (None, [])}
            choice["delta"] = told
        if choice["index"] in open_choices:
            choice["finish_reason"] = None
        chunks.append(head | {"choices": [choice]})
    return chunks
