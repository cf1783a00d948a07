"""Defines the request of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar, cast

import msgspec
from pydantic import Field, PlainValidator

from pdlaunch.protocol.openai.generation import MAX_LOGPROBS, GenerationRequest

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16
"""The limit of a completion that names none."""

Prompt = str | list[int]
_TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


def _check_prompt(value: object) -> Prompt | list[Prompt]:
    """Check by hand: pydantic would try a union of lists item by item, and name every try."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of these, and not empty")
    if isinstance(value[0], int) and (token_ids := _token_ids(value)) is not None:
        return token_ids
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    prompts = [item if isinstance(item, str) else _token_ids(item) for item in value]
    if not all(prompt is not None for prompt in prompts):
        raise ValueError("every prompt must be a string or a non-empty list of token ids")
    return [prompt for prompt in prompts if prompt is not None]


def _token_ids(value: object) -> list[int] | None:
    """Return ``value`` if it is a non-empty list of token ids.

    A prompt can have very many, so there is no loop over them in Python.
    """
    try:
        return msgspec.convert(value, _TokenIds) if isinstance(value, list) and value else None
    except msgspec.ValidationError:
        return None


_PROMPT_CHECK = PlainValidator(_check_prompt, json_schema_input_type=Prompt | list[Prompt])


class CompletionRequest(GenerationRequest):
    """Asks for a text completion of one or several prompts."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = GenerationRequest.NEUTRAL | {
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: Annotated[
        str | list[int] | list[str | list[int]],
        PlainValidator(_check_prompt, json_schema_input_type=Prompt | list[Prompt]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def has_token_ids(self) -> bool:
        """Tell whether there is one prompt, given as token ids."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], int)

    @property
    def prompts(self) -> list[Prompt]:
        """Return one entry for each prompt, in order."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return cast(list[Prompt], [prompt] if isinstance(prompt[0], int) else prompt)

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs
