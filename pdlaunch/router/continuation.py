"""Goes on with a stream at an engine that takes output tokens only as the end of a prompt.

::

    first engine    P ─> o1 o2 .. ok          told: text of o1 .. ok
    next engine     P o1 o2 .. ok ─> ok+1 ..  told: text of ok+1 ..

So an answer goes on whose next token depends on nothing but the tokens before. Stop strings and log
probabilities are left to the client, who asks again: they may lie on both sides of the seam.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

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
    "seed", "several choices", "structured output", "reasoning", "images", "fields", "token ids",
    "half a character", "length", "text", "version",
)  # fmt: skip
# Prompt tokens that are detokenized with the output, whose text depends on them.
NUM_CONTEXT_TOKENS = 64
MAX_PARTS = 8  # tokens at the end that may be parts of one character
_HALF_CHARACTER = "\ufffd"

# Fields that mean the same behind a longer prompt.
_PASSED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "logit_bias"),
    *("spaces_between_special_tokens", "allowed_token_ids", "cache_salt", "priority", "user"),
)
# Also labels, fields that have shaped the prompt already, and fields that are set here.
_KNOWN = {
    *_PASSED,
    *("add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs"),
    *("continue_final_message", "documents", "include_reasoning", "max_completion_tokens"),
    *("max_tokens", "messages", "metadata", "min_tokens", "n", "parallel_tool_calls", "prompt"),
    *("prompt_cache_key", "reasoning_effort", "request_id", "response_format", "return_token_ids"),
    *("safety_identifier", "service_tier", "session_id", "store", "stream", "stream_interval"),
    *("stream_options", "tool_choice", "truncate_prompt_tokens", "truncation_side"),
}
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
    if any(body.get(name) for name in _STRUCTURED) or response_format != {"type": "text"}:
        return "structured output"
    if is_chat and (capabilities.splits_reasoning or transcript.has_other_output):
        return "reasoning"
    if is_chat and _has_media(prompt.text):
        return "images"
    # Completions may ask for no log probabilities but that of the token itself: ``logprobs: 0``.
    asks_logprobs = not is_chat and body.get("logprobs") is not None
    if asks_logprobs or any(value and name not in _KNOWN for name, value in body.items()):
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
    prompt: PromptRequest,
    transcript: Transcript,
    detokenize: Detokenize,
    max_model_len: int | None,
) -> Continuation:
    """Return the continuation of an answer whose engine has died.

    Raises LookupError, with one of ``LOST_REASONS``, when its text or tokens cannot go on.
    """
    text, num_tokens = await _find_text(detokenize, transcript)
    if num_tokens < len(transcript.output_token_ids):
        if prompt.body.get("return_token_ids"):
            raise LookupError("half a character")
        transcript.drop_tokens(num_tokens)
    return Continuation(prompt, transcript, text, max_model_len)


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

    ``text``: the text of the transcript's tokens; the client may lack the end of it. ``body``: what
    /v1/completions is asked. Raises LookupError when no limit of tokens is known.
    """

    def __init__(
        self, prompt: PromptRequest, transcript: Transcript, text: str, max_model_len: int | None
    ) -> None:
        self._prompt = prompt
        self._prompt_token_ids = transcript.prompt_token_ids
        # A copy: the transcript grows while the next engine answers.
        self._output_token_ids = list(transcript.output_token_ids)
        self._untold = text[len(transcript.text) :]
        self.body = self._body(max_model_len)

    def _body(self, max_model_len: int | None) -> bytes:
        body, limit = self._prompt.body, self._prompt.max_tokens
        num_tokens = len(self._output_token_ids)
        if limit is None and self._prompt.endpoint.is_chat:
            if max_model_len is None:
                raise LookupError("length")
            limit = max_model_len - len(self._prompt_token_ids)
        max_tokens = (DEFAULT_MAX_TOKENS if limit is None else limit) - num_tokens
        if max_tokens < 1:
            raise LookupError("length")
        passed = {name: body[name] for name in _PASSED if body.get(name) is not None}
        own = {
            "prompt": self._prompt_token_ids + self._output_token_ids,
            "max_tokens": max_tokens,
            "min_tokens": max(0, (body.get("min_tokens") or 0) - num_tokens),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return msgspec.json.encode(passed | own)

    def take(self, chunk: Chunk) -> None:
        """Make the chunk one of the first engine's. Raises LookupError, TypeError."""
        usage = chunk.get("usage")
        if usage is not None:
            num_tokens = len(self._output_token_ids)
            chunk["usage"] = {
                "prompt_tokens": usage["prompt_tokens"] - num_tokens,
                "completion_tokens": usage["completion_tokens"] + num_tokens,
                "total_tokens": usage["total_tokens"],
            }
        for choice in chunk["choices"]:
            choice.pop("prompt_token_ids", None)
            text, self._untold = self._untold + choice["text"], ""
            if self._prompt.endpoint.is_chat:
                del choice["text"]
                choice["delta"] = {"content": text}
            else:
                choice["text"] = text
