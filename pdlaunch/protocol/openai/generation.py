"""Defines the fields that completions and chat completions share.

Among them is the internal field ``resume``, with which a choice goes on at another engine:
``{"choices": [[{"token_id": 5, "logprob": -0.1, "top_logprobs": [[5, -0.1]]}, ...], ...], "sent":
true}`` has the output tokens so far of each choice. A choice whose last token has a
``finish_reason`` is over and needs no more.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from pdlaunch.errors import RequestError
from pdlaunch.protocol.kv_params import FirstToken, KVTransferParams, from_wire
from pdlaunch.protocol.openai.body import RequestBody


class Resume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Holds output tokens that exist already, by choice."""

    choices: list[list[FirstToken]]
    sent: bool = True
    """The client has what a stream emits for these tokens (role, text, logprobs, finish_reason): it
    is not emitted again.
    """


def read_resume(field: object, num_choices: int) -> Resume:
    """Check the field; raises RequestError."""
    try:
        resume = msgspec.convert(field, Resume)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(f"resume: {error}", param="resume") from None
    if len(resume.choices) != num_choices:
        raise RequestError(
            f"resume has {len(resume.choices)} choices, the request n={num_choices}",
            param="resume.choices",
        )
    return resume


MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LABEL_LENGTH = 1024
MAX_STOP_STRINGS = 32
MAX_STOP_LENGTH = 1000
MAX_LOGIT_BIAS = 1024
"""Entries of ``logit_bias``; OpenAI takes 300, vLLM any number."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _int_keys(value: object) -> object:
    """Convert keys to integers, which JSON does not have: ``{"15043": -100}``."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(value)} entries; at most {MAX_LOGIT_BIAS} are accepted")
    try:
        return {int(key): bias for key, bias in value.items()}
    except (TypeError, ValueError):
        raise ValueError("keys must be token ids") from None


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    BeforeValidator(_as_list, json_schema_input_type=list[str] | str),
    Field(max_length=MAX_STOP_STRINGS),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_int_keys)
]


class StreamOptions(RequestBody):
    """Says what a stream carries besides text."""

    PLACE = "stream_options."
    HINTS = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(RequestBody):
    """Holds the fields that a model's generation_config.json has too; the defaults are neutral."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1: off.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)


class SamplingDefaults(SamplingFields):
    """Holds what requests get for the sampling fields that they leave open."""

    max_new_tokens: int | None = Field(None, ge=1)
    """Limits answers of chats; completions have OpenAI's default."""


class GenerationRequest(SamplingFields):
    """Holds the sampling and streaming fields of both completion APIs.

    ``model_fields_set`` tells which of them the client has given. ``user``,
    ``safety_identifier`` and ``prompt_cache_key`` are accepted as labels.
    """

    # What would change the answer is refused, also where vLLM has it no more (``guided_*``): an
    # answer without the constraint that was asked for would be wrong in silence.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "allowed_token_ids": (),
        "bad_words": ([],),
        "early_stopping": (False,),
        "ebnf": (),
        "ec_transfer_params": ({},),
        "echo": (False,),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "json_schema": (),
        "length_penalty": (1, 1.0),
        "logits_processors": ([],),
        "logprob_token_ids": (),
        "lora_path": (),
        "moderation": (),
        "priority": (0,),
        "prompt_embeds": (),
        "prompt_logprobs": (),
        "regex": (),
        "repetition_detection": (),
        "response_format": ({"type": "text"},),
        "return_prompt_text": (False,),
        "return_tokens_as_token_ids": (False,),
        "spaces_between_special_tokens": (True,),
        "structural_tag": (),
        "structured_outputs": (),
        "thinking_token_budget": (-1,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "watermarking": (False,),
    }
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prompt_cache_options",
            "prompt_cache_retention",
            "request_id",
            "return_mm_kwargs",
            "return_token_offsets",
            "routed_experts_prompt_start",
            "service_tier",
            "session_id",
            "store",
            "stream_interval",
            "truncation_side",
            "vllm_xargs",
        }
    )

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopStrings = []
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_CHOICES)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: LogitBias = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field("", max_length=1024)
    return_token_ids: bool = False
    user: str = Field("", max_length=MAX_LABEL_LENGTH)
    safety_identifier: str = Field("", max_length=MAX_LABEL_LENGTH)
    prompt_cache_key: str = Field("", max_length=MAX_LABEL_LENGTH)
    kv_transfer_params: dict[str, Any] | None = None
    resume: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.is_remote_prefill:
            return self
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {limit}", param="min_tokens"
            )
        return self

    @property
    def is_remote_prefill(self) -> bool:
        """Tell whether a router asks for the first token only; the other fields then describe the
        whole request.
        """
        return (
            self.kv_transfer_params is not None
            and self.kv_transfer_params.get("do_remote_decode") is True
        )

    @property
    def token_limit(self) -> int | None:
        """Return max_completion_tokens, else max_tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage
            and self.stream_options is not None
            and self.stream_options.continuous_usage_stats
        )

    @property
    def num_top_logprobs(self) -> int | None:
        """Return None for no logprobs, 0 for those of the token itself."""
        raise NotImplementedError

    def kv_transfer(self) -> KVTransferParams:
        """Return ``kv_transfer_params``, checked; raises RequestError naming the key."""
        return (
            KVTransferParams()
            if self.kv_transfer_params is None
            else from_wire(self.kv_transfer_params)
        )

    def resumed(self) -> Resume | None:
        """Return ``resume``, checked; raises RequestError."""
        return None if self.resume is None else read_resume(self.resume, self.n)
