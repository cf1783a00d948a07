"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from pdlaunch.protocol.openai.generation import MAX_LOGPROBS, GenerationRequest

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


def _check_prompt(value: object) -> object:
    """By hand, as a union of lists would be tried item by item and answer with one error per try."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of these, and not empty")
    if _is_token_ids(value):
        return value
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    if not all(isinstance(item, str) or (isinstance(item, list) and item and _is_token_ids(item)) for item in value):
        raise ValueError("every prompt must be a string or a non-empty list of token ids")
    return value


def _is_token_ids(value: list[object]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)


Prompt = str | list[int]


class CompletionRequest(GenerationRequest):
    """A text completion of one or several prompts."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = GenerationRequest.NEUTRAL | {"best_of": (1,), "suffix": ("",)}

    prompt: Annotated[str | list[int] | list[str | list[int]], BeforeValidator(_check_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[Prompt]:
        """One entry a prompt, in order."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Prompt] = []
        token_ids: list[int] = []
        for item in self.prompt:
            if isinstance(item, int):
                token_ids.append(item)
            else:
                prompts.append(item)
        return [token_ids] if token_ids else prompts

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs
