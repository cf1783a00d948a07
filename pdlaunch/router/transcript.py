"""Remembers the output that a client has received, and finds the new parts of an engine's chunk.

The engine may change in the middle of an answer. Roles, finished choices and the prompt's tokens
are not sent twice.
"""

from typing import Any

import msgspec

from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage
from pdlaunch.router.engine_client import Chunk


class ChoiceTranscript(msgspec.Struct):
    """Holds the output of one choice that the client has."""

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
        self._has_untold_tokens = False
        self._told: set[str] = set()

    @property
    def is_done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def has_tokens(self) -> bool:
        return self._has_untold_tokens or self.num_tokens > 0

    @property
    def can_resume(self) -> bool:
        return not self._has_untold_tokens

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
        """Record ``chunk`` and remove what the client has; return False if nothing is left."""
        # Check all choices first: no token of an invalid chunk may count as sent.
        for choice in chunk["choices"]:
            _require_form(choice, len(self._choices))
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
        is_hidden = self._has_untold_tokens or (self.is_done and not self.num_tokens)
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
        self._has_untold_tokens |= has_text and not told.token_ids
        is_end = told.finish_reason is not None
        return has_output or has_text or is_end or bool(token_ids or choice.get("logprobs"))


def _require_form(choice: dict[str, Any], num_choices: int) -> None:
    if not 0 <= choice["index"] < num_choices:
        raise IndexError("the index of a choice is out of range")
    if not isinstance(choice.get("token_ids") or [], list):
        raise TypeError("token ids are not a list")
    if choice.get("delta") is None:
        if not isinstance(choice["text"], str | None):
            raise TypeError("a text is not a string")
    elif not isinstance(choice["delta"], dict):
        raise TypeError("a delta is not an object")


def _is_new(fields: dict[str, Any], name: str, told: set[str]) -> bool:
    """Return whether a member is new to the client; remove it if the client has it."""
    if fields.get(name) is None:
        return False
    if name in told:
        del fields[name]
        return False
    told.add(name)
    return True
