"""Reads a prefill engine's answer, and makes of it what decode is given."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from pdlaunch.http.watch.canary import CACHED_AT_PREFILL
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.openai.responses import REPORT_KEY, WORK_KEY
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_stream import Chunk


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Says what prefill has done for one prompt."""

    engine: Engine
    params: dict[str, Any] | None
    """``kv_transfer_params`` for the decode engine; None: there are no blocks to pull."""
    has_first_tokens: bool
    """The params hold the first tokens, so that they need not come from decode."""
    open_choices: frozenset[int]
    """Choices that go on after their first token."""
    num_prompt_tokens: int
    work: object = None
    """The engine's report of its work beside the answer."""
    usage: dict[str, Any] = {}
    report: Any = None
    """The engine's spans, as they came."""
    chunks: list[Chunk]
    """The answer as the chunks of a stream."""

    @property
    def is_final(self) -> bool:
        """Tell whether every choice ended with its first token, so that the answer is whole."""
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
            # With it decode would tell how much prefill had cached, and not whether it pulled.
            return {name: value for name, value in self.params.items() if name != CACHED_AT_PREFILL}
        ours = self.params["pdlaunch"] | {"first_token_sent": True}
        if engine.role != "decode":
            return {"do_remote_prefill": False, "do_remote_decode": False, "pdlaunch": ours}
        return self.params | {"pdlaunch": ours}


class HandoverStream:
    """Reads the answer of a prefill engine, of one choice, chunk by chunk.

    Its methods raise LookupError, TypeError or AttributeError when the chunks are not of the OpenAI
    form.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._params: dict[str, Any] | None = None
        self._has_ended = False
        self.is_final = False
        """The choice has ended with its first token."""
        self.num_prompt_tokens = 0

    def take(self, chunk: Chunk) -> None:
        """Note what ``chunk`` says, and leave in it what is for the client, whose answer goes on
        after ``length``.
        """
        self.num_prompt_tokens = chunk["usage"]["prompt_tokens"]
        if "kv_transfer_params" in chunk:
            self._params = chunk.pop("kv_transfer_params")
            self._has_ended = True
        else:
            # What the prefix cache held is known at the end alone.
            chunk["usage"] = {"prompt_tokens": self.num_prompt_tokens}
        for choice in chunk["choices"]:
            if choice["finish_reason"] == "length":
                choice["finish_reason"] = None
            self.is_final |= choice["finish_reason"] is not None

    def handover(self) -> Handover:
        """Return what all of the chunks say."""
        if not self._has_ended:
            raise LookupError("the answer ended without kv_transfer_params")
        ours = (self._params or {}).get("pdlaunch") or {}
        return Handover(
            engine=self._engine,
            params=self._params,
            has_first_tokens=bool(ours.get("first_tokens")),
            open_choices=frozenset() if self.is_final else frozenset([0]),
            num_prompt_tokens=self.num_prompt_tokens,
            chunks=[],
        )


def read_handover(engine: Engine, raw: bytes, *, is_chat: bool) -> Handover:
    """Read a prefill engine's answer.

    Raises ValueError, RecursionError, LookupError, TypeError or AttributeError when it is not of
    the OpenAI form.
    """
    answer: dict[str, Any] = msgspec.json.decode(raw)
    report = answer.pop(REPORT_KEY, None)
    work = answer.pop(WORK_KEY, None)
    params = answer.get("kv_transfer_params") or None
    ours = None if params is None else params.get("pdlaunch")
    first_tokens = (ours or {}).get("first_tokens") or []
    open_choices = frozenset(
        choice["index"]
        for choice in answer["choices"]
        # An engine that gives no first token has drawn one that nobody gets: decode draws all.
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
        work=work,
        usage=answer["usage"],
        report=report,
        chunks=chunks_of_answer(answer, is_chat=is_chat, open_choices=open_choices),
    )


def _ends(first_tokens: list[dict[str, Any]], choice: int) -> bool:
    return choice < len(first_tokens) and first_tokens[choice].get("finish_reason") is not None


def chunks_of_answer(
    answer: dict[str, Any], *, is_chat: bool, open_choices: Collection[int]
) -> list[Chunk]:
    """Return the chunks that say what a whole answer says.

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
    """Return a whole answer as one chunk, with all that stands in it."""
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
