"""Describes the model to the server: tokenizer, chat template and limits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import read_generation_config, read_model_shape
from pdlaunch.engine.server.chat_template import ChatTemplate, load_chat_template
from pdlaunch.engine.server.tokenizer import TextTokenizer
from pdlaunch.errors import ConfigError, RequestError
from pdlaunch.http.errors import model_not_found
from pdlaunch.protocol.openai.body import parse_request
from pdlaunch.protocol.openai.requests import SamplingDefaults

_log = logging.getLogger(__name__)

UNBOUNDED_PROMPT_CHARS = 2**26
"""Longest text of a prompt where the tokenizer sets no bound."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Describes one model under one name."""

    name: str
    model_dir: str
    max_model_len: int
    vocab_size: int
    """Token ids are below it; the tokenizer may know fewer."""
    eos_token_ids: tuple[int, ...]
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Defaults of the sampling fields that requests leave open."""

    @property
    def max_prompt_chars(self) -> int:
        """Return the longest text of a prompt that is accepted without looking closer."""
        length = self.tokenizer.token_length
        return UNBOUNDED_PROMPT_CHARS if length is None else self.max_model_len * length.max_chars

    def too_long(self, finding: str, param: str) -> RequestError:
        """Return the refusal of a prompt that does not fit. ``finding``: ``has 9000 tokens``."""
        return RequestError(
            f"the prompt {finding}; this model's maximum context length is {self.max_model_len} "
            "tokens, one of which is for the "
            "answer",
            param=param,
            code="context_length_exceeded",
        )

    def check_name(self, given: str | None) -> None:
        """Raise RequestError (404) for another model's name; no name means this model."""
        if given is not None and given != self.name:
            raise model_not_found(given, self.name)

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Raise RequestError for ids that the model does not have."""
        highest = max(token_ids, default=0)
        if highest >= self.vocab_size:
            raise RequestError(
                f"token id {highest} is not below the vocabulary's {self.vocab_size}", param=param
            )

    def remaining_tokens(self, num_prompt_tokens: int, wanted: int | None, param: str) -> int:
        """Return how many tokens may follow a prompt.

        Raises RequestError when the prompt, or it and ``wanted``, are too long.
        """
        if num_prompt_tokens == 0:
            raise RequestError("the prompt has no tokens", param=param)
        if num_prompt_tokens >= self.max_model_len:
            raise self.too_long(f"has {num_prompt_tokens} tokens", param)
        remaining = self.max_model_len - num_prompt_tokens
        if wanted is not None and wanted > remaining:
            raise RequestError(
                f"the prompt's {num_prompt_tokens} tokens and max_tokens={wanted} exceed this "
                "model's maximum context length of "
                f"{self.max_model_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return remaining


def load_served_model(spec: EngineSpec, progress: Callable[[str], None]) -> ServedModel:
    """Read what the server needs from the model's folder; takes up to seconds. Raises
    ConfigError.
    """
    progress("reading the tokenizer")
    shape = read_model_shape(spec.model_dir)
    defaults = (
        read_sampling_defaults(spec.model_dir)
        if spec.generation_config == "auto"
        else SamplingDefaults()
    )
    if changed := defaults.model_dump(exclude_defaults=True):
        _log.info("requests that say nothing else get generation_config.json's %s", changed)
    return ServedModel(
        name=spec.served_model_name,
        model_dir=spec.model_dir,
        max_model_len=spec.max_model_len,
        vocab_size=shape.vocab_size,
        eos_token_ids=shape.eos_token_ids,
        tokenizer=TextTokenizer.load(spec.model_dir),
        chat_template=load_chat_template(spec.model_dir),
        defaults=defaults,
    )


def read_sampling_defaults(model_dir: str | Path) -> SamplingDefaults:
    """Return the defaults in the model's generation_config.json, as vLLM takes them; neutral ones
    for what it leaves open.

    Raises ConfigError when the file is broken or a value is out of range.
    """
    try:
        settings = read_generation_config(Path(model_dir))
        return parse_request(SamplingDefaults, settings, public=False)
    except RequestError as error:
        raise ConfigError(
            f"{model_dir}/generation_config.json: {error}",
            field="model",
            fix="Correct generation_config.json of the model, or set generation_config: vllm.",
        ) from None
