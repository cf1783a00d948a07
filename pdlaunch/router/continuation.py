"""Remembers the output that a client has, so that nothing is sent twice when the engine changes;
and continues a stream at an engine that takes output tokens only as the end of a prompt.

::

    first engine    P ─> o1 o2 .. ok          sent: text of o1 .. ok
    next engine     P o1 o2 .. ok ─> ok+1 ..  sent: text of ok+1 ..

The first engine is a prefill engine of vLLM that has drawn ``o1``, or any engine that has died.
An answer can continue only if each next token depends on nothing but the tokens before it. Requests
with stop strings or log probabilities end with an error: a stop string may span the two engines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import msgspec

from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.openai.requests import DEFAULT_MAX_TOKENS
from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine_client import Chunk

Detokenize = Callable[[list[int]], Awaitable[str]]

# Reasons why a stream cannot continue at another engine.
LOST_REASONS = (
    "seed", "several choices", "structured output", "reasoning", "images", "fields", "token ids",
    "half a character", "length", "text", "version",
)  # fmt: skip
# Detokenize this many prompt tokens with the output, because the output's text depends on them.
NUM_CONTEXT_TOKENS = 64
MAX_PARTS = 8  # at most this many tokens at the end may be parts of one character
_HALF_CHARACTER = "\ufffd"

# Fields whose meaning does not change when the prompt gets longer.
_PASSED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "logit_bias"),
    *("spaces_between_special_tokens", "allowed_token_ids", "cache_salt", "priority", "user"),
)
# Also labels, fields that are already part of the prompt, and fields that this module sets.
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


class ChoiceTranscript(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None
    texts: list[str] = []
    told: set[str] = set()  # members already sent that are sent only once: role, prompt tokens


class Transcript:
    """Holds the output that the client has. Each chunk goes through ``admit`` or ``extend``."""

    def __init__(self, num_choices: int, *, keeps_text: bool = False) -> None:
        self.num_tokens = 0
        self.prompt_token_ids: list[int] = []  # kept only where text is kept
        # The client has got reasoning or tool calls, which ``text`` does not contain.
        self.has_other_output = False
        self._keeps_text = keeps_text
        self._choices = [ChoiceTranscript() for _ in range(num_choices)]
        self._usage = Usage()
        self._has_usage = False
        self.has_untold_tokens = False  # the client has tokens whose ids are not known
        self._told: set[str] = set()

    @property
    def is_done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def has_tokens(self) -> bool:
        return self.has_untold_tokens or self.num_tokens > 0

    @property
    def output_token_ids(self) -> list[int]:
        return self._choices[0].token_ids

    @property
    def text(self) -> str:
        return "".join(self._choices[0].texts)

    def drop_tokens(self, num_tokens: int) -> None:
        """Forget tokens whose text the client lacks, after the first ``num_tokens``."""
        token_ids = self._choices[0].token_ids
        self.num_tokens -= len(token_ids[num_tokens:])
        del token_ids[num_tokens:]

    def admit(self, chunk: Chunk) -> bool:
        """Record ``chunk`` and remove what the client has; return False if nothing is left. Raises
        what ``blames`` handles if the chunk has not the OpenAI form.
        """
        # Check all choices first: no token of an invalid chunk may count as sent.
        for choice in chunk["choices"]:
            if not 0 <= choice["index"] < len(self._choices):
                raise IndexError("the index of a choice is out of range")
            if not isinstance(choice.get("token_ids") or [], list):
                raise TypeError("token ids are not a list")
            if choice.get("delta") is None:
                if not isinstance(choice["text"], str | None):
                    raise TypeError("a text is not a string")
            elif not isinstance(choice["delta"], dict):
                raise TypeError("a delta is not an object")
        self.note_usage(chunk.pop("usage", None))
        if self._keeps_text:
            self._keep(chunk)
        _is_new(chunk, "prompt_token_ids", self._told)
        chunk["choices"] = [choice for choice in chunk["choices"] if self._admit_choice(choice)]
        return bool(chunk["choices"])

    def extend(self, chunk: Chunk) -> int:
        """Admit a chunk with text and its tokens for the only choice, and nothing else; return the
        number of tokens. Other chunks are not recorded: 0. Saves a quarter of the router's time
        for a token.
        """
        try:
            (choice,) = chunk["choices"]
            (told,) = self._choices
            num_tokens = len(choice["token_ids"])
            delta = choice.get("delta")
            text = choice["text"] if delta is None else delta["content"]
            is_plain = (
                choice["index"] == 0
                and type(text) is str
                and text != ""
                and (delta is None or len(delta) == 1)
                and told.finish_reason is None
                and choice.get("finish_reason") is None
                and not choice.get("logprobs")
                and not chunk.get("usage")
                and "prompt_token_ids" not in chunk
                and "prompt_token_ids" not in choice
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            return 0
        if not is_plain or not num_tokens:
            return 0
        chunk.pop("usage", None)
        told.token_ids.extend(choice["token_ids"])
        self.num_tokens += num_tokens
        if self._keeps_text:
            told.texts.append(text)
        return num_tokens

    def resume_field(self) -> dict[str, Any]:
        choices = []
        for told in self._choices:
            tokens: list[dict[str, Any]] = [{"token_id": token_id} for token_id in told.token_ids]
            if tokens and told.finish_reason is not None:
                tokens[-1]["finish_reason"] = told.finish_reason
            choices.append(tokens)
        return {"choices": choices, "sent": True}

    def usage(self) -> Usage:
        """Return the first engine's count of prompt tokens, and the count of output tokens sent."""
        # vLLM hides the ids of reasoning tokens, which may be the whole answer.
        is_hidden = self.has_untold_tokens or (self.is_done and not self.num_tokens)
        num_tokens = self._usage.completion_tokens if is_hidden else self.num_tokens
        total_tokens = self._usage.prompt_tokens + num_tokens
        return msgspec.structs.replace(
            self._usage, completion_tokens=num_tokens, total_tokens=total_tokens
        )

    def note_usage(self, usage: dict[str, Any] | None) -> None:
        if usage is None:
            return
        # Keep the first engine's cached tokens: a second engine has the whole prompt computed.
        if not self._has_usage:
            self._has_usage = "completion_tokens" in usage
            self._usage.prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details")
            if details is not None:
                self._usage.prompt_tokens_details = msgspec.convert(details, PromptTokensDetails)
        if usage.get("completion_tokens_details") is not None:
            self._usage.completion_tokens_details = usage["completion_tokens_details"]
        self._usage.completion_tokens = usage.get("completion_tokens") or 0

    def _keep(self, chunk: Chunk) -> None:
        for choice in chunk["choices"]:
            told = self._choices[choice["index"]]
            ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")
            if ids and not self.prompt_token_ids:
                self.prompt_token_ids = ids
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            if not isinstance(text, str):
                raise TypeError("a text is not a string")
            told.texts.append(text)
            others = (value for name, value in delta.items() if name not in ("role", "content"))
            self.has_other_output |= any(others)

    def _admit_choice(self, choice: dict[str, Any]) -> bool:
        told = self._choices[choice["index"]]
        # Prefill or an earlier engine may have ended the choice.
        if told.finish_reason is not None:
            return False
        token_ids = choice.get("token_ids") or []
        told.token_ids.extend(token_ids)
        self.num_tokens += len(token_ids)
        told.finish_reason = choice.get("finish_reason")
        delta = choice.get("delta")
        if delta is None:
            has_output = _is_new(choice, "prompt_token_ids", told.told)
            has_text = bool(choice["text"])
        else:
            has_output = _is_new(delta, "role", told.told)
            has_text = any(value for name, value in delta.items() if name != "role")
        # Text that was held back comes without tokens of its own. A choice with text but without
        # any token id cannot be resumed.
        self.has_untold_tokens |= has_text and not told.token_ids
        is_end = told.finish_reason is not None
        return has_output or has_text or is_end or bool(token_ids or choice.get("logprobs"))


def _is_new(fields: dict[str, Any], name: str, told: set[str]) -> bool:
    """Return whether a member is new to the client; remove it if the client has it."""
    if fields.get(name) is None:
        return False
    if name in told:
        del fields[name]
        return False
    told.add(name)
    return True


def obstacle(prompt: PromptRequest, transcript: Transcript, capabilities: Capabilities) -> str:
    """Return why the answer cannot continue at another engine (in ``LOST_REASONS``), or ``""``."""
    if reason := request_obstacle(prompt, capabilities):
        return reason
    if prompt.endpoint.is_chat and transcript.has_other_output:
        return "reasoning"
    has_ids = transcript.prompt_token_ids and not transcript.has_untold_tokens
    return "" if has_ids else "token ids"


def request_obstacle(prompt: PromptRequest, capabilities: Capabilities) -> str:
    """Return why answers to a request cannot continue at another engine; empty if they can."""
    body, is_chat = prompt.body, prompt.endpoint.is_chat
    response_format = body.get("response_format") or {"type": "text"}
    if not capabilities.can_continue:
        return "version"
    if body.get("seed") is not None:
        return "seed"
    if prompt.num_choices > 1:
        return "several choices"
    if any(body.get(name) for name in _STRUCTURED) or response_format != {"type": "text"}:
        return "structured output"
    if is_chat and capabilities.splits_reasoning:
        return "reasoning"
    if is_chat and _has_media(prompt.text):
        return "images"
    # ``logprobs: 0`` of completions is not off: it asks for the sampled token's log probability.
    asks_logprobs = not is_chat and body.get("logprobs") is not None
    if asks_logprobs or any(value and name not in _KNOWN for name, value in body.items()):
        return "fields"
    return ""


def _has_media(messages: msgspec.Raw | None) -> bool:
    return messages is not None and any(
        isinstance(part, dict) and part.get("type") != "text"
        for message in msgspec.json.decode(messages)
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def continue_first_token(
    prompt: PromptRequest, chunk: Chunk, max_model_len: int | None
) -> Continuation:
    """Return the continuation after the token in a prefill engine's chunk. Raises LookupError."""
    (choice,) = chunk["choices"]
    text = choice["text"] if "text" in choice else choice["delta"].get("content")
    prompt_token_ids = choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
    if not text or text.endswith(_HALF_CHARACTER) or not prompt_token_ids:
        raise LookupError("text")
    return Continuation(prompt, prompt_token_ids, choice["token_ids"], "", max_model_len)


async def begin_continuation(
    prompt: PromptRequest, transcript: Transcript, detokenize: Detokenize, max_model_len: int | None
) -> Continuation:
    """Return the continuation of an answer whose engine has died. Raises LookupError, with one of
    ``LOST_REASONS``.
    """
    text, num_tokens = await _find_text(detokenize, transcript)
    if num_tokens < len(transcript.output_token_ids):
        if prompt.body.get("return_token_ids"):
            raise LookupError("half a character")
        transcript.drop_tokens(num_tokens)
    untold = text[len(transcript.text) :]
    # A copy: the transcript grows while the next engine answers.
    output = list(transcript.output_token_ids)
    return Continuation(prompt, transcript.prompt_token_ids, output, untold, max_model_len)


async def _find_text(detokenize: Detokenize, transcript: Transcript) -> tuple[str, int]:
    """Return the text of the output, and the number of output tokens that make up this text.

    Trailing tokens that are parts of a character are left out: an engine would send all of the
    prompt's text once that character is complete.
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


@dataclass(eq=False, slots=True)
class Continuation:
    """Turns the next engine's answer into chunks of the client's answer. Raises LookupError."""

    prompt: PromptRequest
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    untold: str  # the end of the text, which the client does not have yet
    max_model_len: InitVar[int | None]
    fields: dict[str, Any] = field(init=False)  # the request to /v1/completions

    def __post_init__(self, max_model_len: int | None) -> None:
        body, limit = self.prompt.body, self.prompt.max_tokens
        num_tokens = len(self.output_token_ids)
        if limit is None and self.prompt.endpoint.is_chat:
            if max_model_len is None:
                raise LookupError("length")
            limit = max_model_len - len(self.prompt_token_ids)
        max_tokens = (DEFAULT_MAX_TOKENS if limit is None else limit) - num_tokens
        if max_tokens < 1:
            raise LookupError("length")
        passed = {name: body[name] for name in _PASSED if body.get(name) is not None}
        own = {
            "prompt": self.prompt_token_ids + self.output_token_ids,
            "max_tokens": max_tokens,
            "min_tokens": max(0, (body.get("min_tokens") or 0) - num_tokens),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        self.fields = passed | own

    def body(self, extra: dict[str, Any]) -> bytes:
        return msgspec.json.encode(self.fields | extra)

    def take(self, chunk: Chunk) -> None:
        """Rewrite the chunk as the first engine would send it. Raises LookupError, TypeError."""
        if (usage := chunk.get("usage")) is not None:
            num_tokens = len(self.output_token_ids)
            chunk["usage"] = {
                "prompt_tokens": usage["prompt_tokens"] - num_tokens,
                "completion_tokens": usage["completion_tokens"] + num_tokens,
                "total_tokens": usage["total_tokens"],
            }
        for choice in chunk["choices"]:
            choice.pop("prompt_token_ids", None)
            text, self.untold = self.untold + choice["text"], ""
            if self.prompt.endpoint.is_chat:
                del choice["text"]
                choice["delta"] = {"content": text}
            else:
                choice["text"] = text
