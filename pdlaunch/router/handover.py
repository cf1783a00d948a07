"""Reads a prefill engine's answer and manages the lease of its KV blocks: which engine may pull
the blocks, and how they are released if no engine does.
"""

from collections.abc import Collection
from typing import Any

import msgspec

from pdlaunch.http.canary import CACHED_AT_PREFILL, num_recomputed
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import Chunk, blames, refuse_broken
from pdlaunch.router.state import RouterState


class Handover:
    """Holds a prefill engine's answer to one prompt, and the lease until the blocks are pulled."""

    def __init__(self, state: RouterState, engine: Engine, raw: bytes, *, is_chat: bool) -> None:
        """Read ``engine``'s answer. Raises EngineFailure, and what ``blames`` handles."""
        answer: dict[str, Any] = msgspec.json.decode(raw)
        self.engine = engine
        self.report: object = answer.pop(REPORT_KEY, None)  # the engine's spans
        self.usage: dict[str, Any] = answer["usage"]
        self.num_prompt_tokens: int = self.usage["prompt_tokens"]
        # None: there are no blocks to pull.
        self.params: dict[str, Any] | None = answer.get("kv_transfer_params") or None
        ours = (self.params or {}).get("pdlaunch") or {}
        first_tokens = ours.get("first_tokens") or []
        reasons = [token.get("finish_reason") for token in first_tokens]
        ended = {choice for choice, reason in enumerate(reasons) if reason is not None}
        # The client may get the first tokens from prefill.
        self.has_first_tokens = bool(first_tokens)
        open_choices = frozenset(
            choice["index"]
            for choice in answer["choices"]
            # If the params have no first tokens, decode samples all tokens again.
            if (not first_tokens and self.params is not None)
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
        # A counted lease keeps a draining prefill engine from being removed as idle.
        self._is_counted = self.params is not None
        engine.num_leases += self._is_counted

    def pulled(self) -> None:
        self.is_taken = True
        self._answered_at = self._state.now()
        self._uncount()

    def decode_params(self, engine: Engine) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` for ``engine``; None: it must compute the prompt.

        Only decode engines get blocks. Others that do their work get only the first tokens, and
        engines of vLLM get nothing.
        """
        is_vllm = engine.capabilities.is_vllm
        if is_vllm:
            if not self._may_hand_over(engine):
                return None
            # Even if this pull fails, no other engine may pull: prefill may have reused the blocks.
            # Blocks of a native engine are verified, and count as taken once decode has answered.
            self.is_taken = True
        has_first_tokens = self.has_first_tokens and not is_vllm
        if self.params is None or (engine.role != "decode" and not has_first_tokens):
            return None
        if not has_first_tokens:
            # With this field, decode would report the cached tokens of prefill, not its own pull.
            return {name: value for name, value in self.params.items() if name != CACHED_AT_PREFILL}
        # The client got the first tokens from prefill, so decode must not send them again.
        ours = self.params["pdlaunch"] | {"first_token_sent": True}
        if engine.role != "decode":
            return {"do_remote_prefill": False, "do_remote_decode": False, "pdlaunch": ours}
        return self.params | {"pdlaunch": ours}

    def check_pulled(self, engine: Engine, chunk: Chunk) -> None:
        if not engine.capabilities.is_vllm:
            return
        with blames(engine):
            num_tokens = num_recomputed(chunk)
        if num_tokens:
            lease_s = self.engine.capabilities.lease_s
            # If decode answered after the lease had ended, the pair is not at fault.
            is_in_doubt = not lease_s or self._answered_at - self._handed_over_at < lease_s
            self._state.recomputed(self.engine, engine, num_tokens, is_in_doubt=is_in_doubt)

    def end(self, tried: Collection[EngineKey] = ()) -> None:
        """Release the blocks if no engine has pulled them.

        Prefill engines of vLLM take releases only from decode engines, so one that was not
        ``tried`` sends it. Without such an engine the lease expires.
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
        if decode is not None and (params := self.decode_params(decode)) is not None:
            self._state.metrics.count("releases")
            # When vLLM refuses a request at decode, prefill frees its blocks. vLLM refuses a
            # streamed beam search before it computes anything.
            refused = {"prompt": [0], "max_tokens": 1, "stream": True, "use_beam_search": True}
            refused["kv_transfer_params"] = params
            self._state.spawn(self._state.client.notify(decode, "/v1/completions", refused))

    def _uncount(self) -> None:
        self.engine.num_leases -= self._is_counted
        self._is_counted = False

    def _may_hand_over(self, decode: Engine) -> bool:
        age_s, lease_s = self._state.now() - self._handed_over_at, self.engine.capabilities.lease_s
        if self.is_taken or (lease_s and age_s >= lease_s / 2):
            return False
        return self._state.pool.may_hand_over(self.engine, decode)


def chunks_of_answer(
    answer: dict[str, Any], *, is_chat: bool, open_choices: Collection[int]
) -> list[Chunk]:
    """Return a whole answer as chunks of a stream, in which ``open_choices`` are not finished."""
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
            told = message.items()
            choice["delta"] = {name: value for name, value in told if value not in (None, [])}
        if choice["index"] in open_choices:
            choice["finish_reason"] = None
        chunks.append(head | {"choices": [choice]})
    return chunks
