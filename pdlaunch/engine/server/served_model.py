"""Holds the model's text side (tokenizer, template, defaults); converts requests to token ids.

A prompt that cannot fit is refused before it is tokenized. All functions may run in threads.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import read_generation_config, read_model_shape
from pdlaunch.config.model_files.weights import refuse_changes, text_digests
from pdlaunch.engine.server.structured import show_tools
from pdlaunch.engine.server.text import ChatTemplate, TextTokenizer, load_chat_template
from pdlaunch.errors import ConfigError, RequestError
from pdlaunch.http.errors import model_not_found
from pdlaunch.protocol.openai.body import (
    RequestBody,
    num_token_ids,
    parse_request,
    read_json_object,
)
from pdlaunch.protocol.openai.requests import (
    DEFAULT_MAX_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    SamplingDefaults,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)

MIN_TEXT_CHARS = 2**18
# Limit of a text's characters for each token of the context; usual texts have about a third of it.
# Longer texts are refused, because tokenizing takes 100 bytes of memory for each character.
TEXT_CHARS_PER_TOKEN = 16
MIN_TOKEN_IDS = 2**16

_log = logging.getLogger(__name__)

G = TypeVar("G", bound=GenerationRequest)
B = TypeVar("B", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Holds what the server needs of one model."""

    name: str
    max_model_len: int
    vocab_size: int  # token ids are below it; the tokenizer may know fewer
    eos_token_ids: tuple[int, ...]
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    # Defaults of the sampling fields that requests do not set
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    files: dict[str, str] = field(default_factory=dict)  # digests of the files read, by name
    is_short: bool = False  # the KV cache holds less than the model's own context

    @property
    def max_text_chars(self) -> int:
        return max(MIN_TEXT_CHARS, TEXT_CHARS_PER_TOKEN * self.max_model_len)

    @property
    def _context(self) -> str:
        why = " (as many as the KV cache holds, see kv_cache_memory)" if self.is_short else ""
        return f"{self.max_model_len} tokens{why}"

    def too_long(self, finding: str, param: str) -> RequestError:
        """Return the error for a prompt that does not fit. ``finding``: ``has 9000 tokens``."""
        return RequestError(
            f"the prompt {finding}; this model's maximum context length is {self._context}, and "
            "the answer needs at least one of them",
            param=param,
            code="context_length_exceeded",
        )

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        highest = max(token_ids, default=0)
        if highest >= self.vocab_size:
            message = f"token id {highest} is too high: the vocabulary has {self.vocab_size}"
            raise RequestError(message, param=param)

    def output_limit(self, request: GenerationRequest, num_prompt_tokens: int, param: str) -> int:
        """Return the limit of output tokens of a choice. Without a limit in the request, it is the
        rest of the context; for completions at most 16, as with OpenAI, for chats at most the
        model's own default. Raises RequestError.
        """
        wanted, remaining = request.token_limit, self.max_model_len - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise RequestError("the prompt has no tokens", param=param)
        if remaining <= 0:
            raise self.too_long(f"has {num_prompt_tokens} tokens", param)
        if wanted is not None and wanted > remaining:
            raise RequestError(
                f"the prompt's {num_prompt_tokens} tokens and max_tokens={wanted} exceed this "
                f"model's maximum context length of {self._context}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        is_chat = isinstance(request, ChatCompletionRequest)
        default = self.defaults.max_new_tokens if is_chat else DEFAULT_MAX_TOKENS
        # The rank draws a token even for a limit of 0.
        return min(remaining, default or remaining) if wanted is None else max(1, wanted)

    def _parse(self, kind: type[B], body: dict[str, Any], *, public: bool) -> B:
        request = parse_request(kind, body, public=public)
        name = getattr(request, "model", None)
        if name is not None and name != self.name:
            raise model_not_found(name, self.name)
        return request

    def read(self, kind: type[G], raw: bytes) -> G:
        may_be_long = len(raw) > self.max_model_len
        num_tokens = num_token_ids(raw, "prompt", public=False) if may_be_long else 0
        if num_tokens >= self.max_model_len:
            raise self.too_long(f"has {num_tokens} tokens", "prompt")
        return self._parse(kind, read_json_object(raw, public=False), public=False)

    def prompts(self, request: CompletionRequest | ChatCompletionRequest) -> list[list[int]]:
        if request.prompt_token_ids is not None:
            return [request.prompt_token_ids]
        if isinstance(request, ChatCompletionRequest):
            text = self.render_chat(request)
            return [self._encode(text, "messages", request.add_special_tokens)]
        return [
            self._encode(prompt, "prompt", request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompt
        ]

    def render_chat(self, request: ChatCompletionRequest | TokenizeChatRequest) -> str:
        if self.chat_template is None:
            message = f"the model {self.name!r} has no chat template; use /v1/completions"
            raise RequestError(message, param="messages")
        messages = [message.for_template() for message in request.messages]
        tools = [tool.for_template() for tool in request.tools]
        if tools and not self.chat_template.shows_tools:
            messages = show_tools(messages, tools)
        return self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=request.template_variables,
            max_chars=self.max_text_chars,
        )

    def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        if len(text) > self.max_text_chars:
            raise self.too_long(f"has {len(text)} characters", param)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def tokenize(self, raw: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return the answer and the names of ignored fields, as ``detokenize`` does."""
        body = read_json_object(raw)
        request: TokenizeCompletionRequest | TokenizeChatRequest
        if "messages" in body:
            request = self._parse(TokenizeChatRequest, body, public=True)
            text = self.render_chat(request)
        else:
            request = self._parse(TokenizeCompletionRequest, body, public=True)
            text = request.prompt
            if len(text) > self.max_text_chars:
                raise RequestError(
                    f"prompt has {len(text)} characters; at most {self.max_text_chars} are "
                    "tokenized at a time",
                    param="prompt",
                )
        tokens = self.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
        pieces = list(map(self.tokenizer.token_piece, tokens))
        answer = {
            "count": len(tokens),
            "max_model_len": self.max_model_len,
            "tokens": tokens,
            "token_strs": pieces if request.return_token_strs else None,
        }
        return answer, request.ignored_fields

    def detokenize(self, raw: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
        num_ids, max_ids = num_token_ids(raw, "tokens"), max(MIN_TOKEN_IDS, self.max_model_len)
        if num_ids > max_ids:
            raise RequestError(
                f"tokens has {num_ids} token ids; at most {max_ids} are detokenized at a time",
                param="tokens",
            )
        request = self._parse(DetokenizeRequest, read_json_object(raw), public=True)
        self.check_token_ids(request.tokens, "tokens")
        text = self.tokenizer.decode(request.tokens, skip_special_tokens=False)
        return {"prompt": text}, request.ignored_fields


def load_served_model(spec: EngineSpec, progress: Callable[[str], None]) -> ServedModel:
    """Read what the server needs from the model's folder; takes seconds. Raises ConfigError."""
    progress("reading the tokenizer")
    files = text_digests(Path(spec.model_dir))
    shape = read_model_shape(spec.model_dir)
    defaults = (
        read_sampling_defaults(spec.model_dir)
        if spec.generation_config == "auto"
        else SamplingDefaults()
    )
    if changed := defaults.model_dump(exclude_defaults=True):
        _log.info("defaults of requests, from generation_config.json: %s", changed)
    model = ServedModel(
        name=spec.served_model_name,
        max_model_len=spec.max_model_len,
        vocab_size=shape.vocab_size,
        eos_token_ids=shape.eos_token_ids,
        tokenizer=TextTokenizer.load(spec.model_dir),
        chat_template=load_chat_template(spec.model_dir),
        defaults=defaults,
        files=files,
    )
    refuse_changes(files, text_digests(Path(spec.model_dir)), "while it was loaded")
    return model


def read_sampling_defaults(model_dir: str | Path) -> SamplingDefaults:
    """Return the defaults in the model's generation_config.json, which vLLM uses too."""
    try:
        settings = read_generation_config(Path(model_dir))
        return parse_request(SamplingDefaults, settings, public=False)
    except RequestError as error:
        raise ConfigError(
            f"{model_dir}/generation_config.json: {error}",
            field="model",
            fix="Correct generation_config.json of the model, or set generation_config: vllm.",
        ) from None
