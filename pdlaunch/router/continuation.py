"""Goes on with a stream at an engine that takes output tokens only as the end of a prompt.

::

    first engine    P ─> o1 o2 .. ok      told: text of o1 .. ok, but what may begin a stop string
    next engine     P o1 o2 .. ok ─> ok+1 ..          text held back ─┘ + text of ok+1 ..

So an answer goes on whose next token depends on nothing but the tokens before. The next engine is
asked for the text of the tokens so far: what the client lacks of it is told first, and stop strings
may lie across the seam.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from pdlaunch.errors import OverloadedError
from pdlaunch.http.errors import RETRY_AFTER_S
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.openai.requests import DEFAULT_MAX_TOKENS
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine_client import Chunk
from pdlaunch.router.transcript import Transcript

Detokenize = Callable[[list[int]], Awaitable[str]]

# The reason why a stream cannot go on at another engine.
LOST_REASONS = (
    "seed", "several choices", "tools", "structured output", "reasoning", "images", "fields",
    "token ids", "half a character", "length", "min_tokens and stop strings", "text", "version",
)  # fmt: skip
# Prompt tokens that are detokenized with the output, whose text depends on them.
NUM_CONTEXT_TOKENS = 64
MAX_PARTS = 8  # tokens at the end that may be parts of one character
_HALF_CHARACTER = "\ufffd"

_SAME_FIELDS = (
    "model temperature top_p top_k min_p repetition_penalty stop stop_token_ids "
    "include_stop_str_in_output ignore_eos skip_special_tokens spaces_between_special_tokens "
    "logit_bias allowed_token_ids cache_salt priority user"
)
_DONE_FIELDS = (
    "add_generation_prompt add_special_tokens chat_template chat_template_kwargs "
    "continue_final_message documents include_reasoning logprobs max_completion_tokens max_tokens "
    "messages metadata min_tokens n parallel_tool_calls prompt prompt_cache_key reasoning_effort "
    "request_id response_format return_token_ids safety_identifier service_tier session_id store "
    "stream stream_interval stream_options tool_choice top_logprobs truncate_prompt_tokens "
    "truncation_side"
)
# Fields that mean the same behind a longer prompt.
_PASSED = tuple(_SAME_FIELDS.split())
# Also labels, fields that have shaped the prompt already, and fields that are set here.
_KNOWN = {*_PASSED, *_DONE_FIELDS.split()}
_STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice")


class StreamLostError(OverloadedError):
    """Ends a stream whose engine has died, because no other engine can go on with it."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(
            f"engine {engine} was lost in the middle of this answer, which cannot go on at another "
            f"engine ({reason}); send the request again",
            status=503,
            retry_after_s=RETRY_AFTER_S,
            code="stream_lost",
        )


def obstacle(prompt: PromptRequest, transcript: Transcript, capabilities: Capabilities) -> str:
    """Return why the answer cannot go on at another engine; empty when it can."""
    body, is_chat = prompt.body, prompt.endpoint.is_chat
    response_format = body.get("response_format") or {"type": "text"}
    if not capabilities.goes_on:
        return "version"
    if body.get("seed") is not None:
        return "seed"
    if prompt.num_choices > 1:
        return "several choices"
    if body.get("tools") or body.get("functions"):
        return "tools"
    if any(body.get(name) for name in _STRUCTURED) or response_format != {"type": "text"}:
        return "structured output"
    if is_chat and (capabilities.splits_reasoning or transcript.has_other_output):
        return "reasoning"
    if is_chat and _has_media(prompt.text):
        return "images"
    if any(value and name not in _KNOWN for name, value in body.items()):
        return "fields"
    if not transcript.can_resume or not transcript.prompt_token_ids:
        return "token ids"
    return ""


def _has_media(messages: msgspec.Raw | None) -> bool:
    return messages is not None and any(
        isinstance(part, dict) and part.get("type") != "text"
        for message in msgspec.json.decode(messages)
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


async def begin_continuation(
    prompt: PromptRequest, transcript: Transcript, detokenize: Detokenize
) -> Continuation:
    """Return the continuation of an answer whose engine has died.

    Raises LookupError, with one of ``LOST_REASONS``, when its text or tokens cannot go on.
    """
    text, num_tokens = await _find_text(detokenize, transcript)
    if num_tokens < len(transcript.output_token_ids):
        if prompt.tells_tokens:
            raise LookupError("half a character")
        transcript.drop_tokens(num_tokens)
    return Continuation(prompt, transcript, text)


async def _find_text(detokenize: Detokenize, transcript: Transcript) -> tuple[str, int]:
    """Return the text of the output, and the number of tokens that it is the text of.

    The last ones are left out while they are parts of a character: an engine would tell all of the
    prompt's text once that character is whole. Raises LookupError when the text is not what the
    client was told.
    """
    output, told = transcript.output_token_ids, transcript.text
    context = transcript.prompt_token_ids[-NUM_CONTEXT_TOKENS:]
    before = await detokenize(context)
    for num_parts in range(min(MAX_PARTS, len(output))):
        num_tokens = len(output) - num_parts
        whole = await detokenize(context + output[:num_tokens])
        if whole.endswith(_HALF_CHARACTER):
            continue
        text = whole[len(before) :]
        if not whole.startswith(before) or not text.startswith(told):
            break
        return text, num_tokens
    raise LookupError("text")


class Continuation:
    """Turns the next engine's answer into further chunks of the client's answer.

    ``text``: the text of the transcript's tokens; the client may lack the end of it.
    """

    def __init__(self, prompt: PromptRequest, transcript: Transcript, text: str) -> None:
        self._prompt = prompt
        self._prompt_token_ids = transcript.prompt_token_ids
        # A copy: the transcript grows while the next engine answers.
        self._output_token_ids = list(transcript.output_token_ids)
        self._text_offset = transcript.text_offset
        stops = prompt.body.get("stop") or []
        self._splice = Splice(
            [stops] if isinstance(stops, str) else stops,
            text,
            len(transcript.text),
            includes_stop=bool(prompt.body.get("include_stop_str_in_output")),
        )

    def body(self, max_model_len: int | None) -> bytes:
        """Return the body for /v1/completions. Raises LookupError when no limit is known."""
        body, is_chat = self._prompt.body, self._prompt.endpoint.is_chat
        num_tokens, limit = len(self._output_token_ids), self._prompt.max_tokens
        if limit is None and is_chat:
            if max_model_len is None:
                raise LookupError("length")
            limit = max_model_len - len(self._prompt_token_ids)
        max_tokens = (DEFAULT_MAX_TOKENS if limit is None else limit) - num_tokens
        if max_tokens < 1:
            raise LookupError("length")
        min_tokens = max(0, (body.get("min_tokens") or 0) - num_tokens)
        if min_tokens and self._splice.is_open:
            raise LookupError("min_tokens and stop strings")
        logprobs = body.get("logprobs")
        if is_chat:
            logprobs = (body.get("top_logprobs") or 0) if logprobs else None
        passed = {name: body[name] for name in _PASSED if body.get(name) is not None}
        own = {
            "prompt": self._prompt_token_ids + self._output_token_ids,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "logprobs": logprobs,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return msgspec.json.encode(passed | own)

    def take(self, chunk: Chunk) -> Chunk:
        """Return the chunk as one of the first engine's. Raises LookupError, TypeError."""
        usage = chunk.get("usage")
        if usage is not None:
            num_tokens = len(self._output_token_ids)
            chunk["usage"] = {
                "prompt_tokens": usage["prompt_tokens"] - num_tokens,
                "completion_tokens": usage["completion_tokens"] + num_tokens,
                "total_tokens": usage["total_tokens"],
            }
        chunk["choices"] = [self._choice(choice) for choice in chunk["choices"]]
        return chunk

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        choice.pop("prompt_token_ids", None)
        is_end = choice.get("finish_reason") is not None
        text, stop = self._splice.take(choice.pop("text"), is_end=is_end)
        if stop is not None:
            choice |= {"finish_reason": "stop", "stop_reason": stop}
        logprobs = choice.get("logprobs")
        if not self._prompt.endpoint.is_chat:
            if logprobs:
                offsets = logprobs["text_offset"]
                logprobs["text_offset"] = [offset + self._text_offset for offset in offsets]
            return choice | {"text": text}
        num_top = self._prompt.body.get("top_logprobs") or 0
        chat_logprobs = _chat_logprobs(logprobs, num_top) if logprobs else None
        return choice | {"delta": {"content": text}, "logprobs": chat_logprobs}


def _chat_logprobs(logprobs: dict[str, Any], num_top: int) -> dict[str, Any]:

    def entry(token: str, logprob: float) -> dict[str, Any]:
        in_bytes = list(token.encode("utf-8", errors="replace"))
        return {"token": token, "logprob": logprob, "bytes": in_bytes}

    values = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    content = [
        entry(token, logprob)
        | {"top_logprobs": [entry(*other) for other in list(top.items())[:num_top]]}
        for token, logprob, top in zip(*values, strict=True)
    ]
    return {"content": content}


class Splice:
    """Joins the text of the next engine to what the client has, with stop strings across the seam.

    ::

        text so far   ......told|held        new text  ....
                          └──window──┘└──window──┘         a stop string may lie here

    The next engine finds the stop strings that lie in its own text.
    """

    def __init__(self, stops: list[str], text: str, num_told: int, *, includes_stop: bool) -> None:
        self._stops = stops
        self._includes_stop = includes_stop
        self._window = max((len(stop) for stop in stops), default=1) - 1
        self._before = text[max(0, min(num_told, len(text) - self._window)) :]
        self._num_held = len(text) - num_told
        self._new = ""
        self.is_open = self._window > 0  # a stop string may still lie across the seam
        self._has_begun = False

    def take(self, text: str, *, is_end: bool) -> tuple[str, str | None]:
        """Return what the client is told now, and the stop string that ends the answer."""
        if self._has_begun:
            return text, None
        self._new += text
        joined = self._before + self._new
        told = len(self._before) - self._num_held
        if self.is_open and (found := self._find(joined)):
            start, end, stop = found
            self._has_begun = True
            return joined[told : end if self._includes_stop else max(told, start)], stop
        if self.is_open and not is_end and len(self._new) < self._window:
            return "", None
        self._has_begun, self.is_open = True, False
        return joined[told:], None

    def _find(self, joined: str) -> tuple[int, int, str] | None:
        """Return start, end and text of the stop string across the seam that ends first."""
        seam = len(self._before)
        found = []
        for place, stop in enumerate(self._stops):
            start = joined.find(stop, max(0, seam - len(stop) + 1))
            if 0 <= start < seam < start + len(stop):
                found.append((start + len(stop), place, start, stop))
        if not found:
            return None
        end, _, start, stop = min(found)
        return start, end, stop
