"""Defines the requests of /v1/completions, /v1/chat/completions, /tokenize and /detokenize.

Also the messages and tools of a chat, and the form in which a chat template receives them.

The internal field ``resume`` continues an answer at another engine: ``{"choices": [[{"token_id":
5, "logprob": -0.1, "top_logprobs": [[5, -0.1]]}, ...], ...], "sent": true}`` has the output tokens
of each choice so far. A choice is finished if its last token has a ``finish_reason``.
"""

import contextlib
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from pdlaunch.errors import RequestError
from pdlaunch.protocol.kv_params import KVTransferParams, TokenOutput, from_wire
from pdlaunch.protocol.openai.body import MAX_JSON_VALUES, RequestBody, Values, num_values

MAX_PARTS = 4096  # most parts in all messages together


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TextPart(RequestBody):
    PLACE = "messages.content."
    HINTS = frozenset({"annotations", "cache_control"})

    type: Literal["text"] = "text"
    text: str

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, part: object) -> object:
        """Return the part with type text. Raises RequestError for images and other media."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, dict) or "text" in part:
            return part
        kind = part.get("type") or next(iter(part), "text")
        if kind != "text":
            raise RequestError(
                f"content of type {str(kind)[:100]!r} is not supported: the model reads text "
                "alone, no images, audio, video or files; send parts of type 'text'",
                param="type",
                code="unsupported_content",
            )
        return part


class FunctionCall(RequestBody):
    PLACE = "messages.tool_calls.function."

    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] = ""


class ToolCall(RequestBody):
    PLACE = "messages.tool_calls."
    HINTS = frozenset({"index"})

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return the call for a chat template. Arguments in JSON become an object."""
        arguments: object = self.function.arguments or {}
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ToolFunction(RequestBody):
    PLACE = "tools.function."

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestBody):
    PLACE = "tools."

    type: Literal["function"] = "function"
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


class ChatMessage(RequestBody):
    """One message. A client may send a message of an earlier answer back with all its members."""

    PLACE = "messages."
    NEUTRAL = {"audio": (), "function_call": ()}
    HINTS = frozenset({"annotations", "refusal"})

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[list[TextPart], BeforeValidator(_as_list), Field(max_length=MAX_PARTS)] = []
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # other APIs have this name for ``reasoning``

    def text(self) -> str:
        """Return the content; parts are joined by newlines, as in vLLM."""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """Return the message for a chat template, with the same members as in vLLM."""
        reasoning = self.reasoning or self.reasoning_content
        members = {
            "tool_calls": [call.for_template() for call in self.tool_calls] or None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        given = {name: value for name, value in members.items() if value is not None}
        return {"role": self.role, "content": self.text()} | given


def _check_size(messages: list[ChatMessage]) -> list[ChatMessage]:
    num_parts = sum(len(message.content) for message in messages)
    if num_parts - len(messages) > MAX_PARTS:  # a part for each message is free
        raise ValueError(f"{num_parts} parts of content; at most {MAX_PARTS} are accepted")
    arguments = [call.function.arguments for message in messages for call in message.tool_calls]
    # The check of the whole body does not see values of JSON inside a string.
    texts = [text.encode() for text in arguments if isinstance(text, str)]
    if sum(map(num_values, texts)) > MAX_JSON_VALUES:
        raise ValueError(
            f"the arguments of tool calls have more than {MAX_JSON_VALUES} strings, lists and "
            "objects"
        )
    return messages


MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024  # openAI takes 300, vLLM any number
DEFAULT_MAX_TOKENS = 16  # of completions; OpenAI's default


class Resume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    choices: list[list[TokenOutput]]
    # The client already has the role, text, logprobs and finish_reason of these tokens.
    sent: bool = True


def _int_keys(value: object) -> object:
    """Convert the string keys of JSON to integers: ``{"15043": -100}``."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(value)} entries; at most {MAX_LOGIT_BIAS} are accepted")
    try:
        return {int(key): bias for key, bias in value.items()}
    except (TypeError, ValueError):
        raise ValueError("keys must be token ids") from None


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    BeforeValidator(_as_list),
    Field(max_length=32),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str, Field(max_length=1024)]


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


class StreamOptions(RequestBody):
    PLACE = "stream_options."
    HINTS = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(RequestBody):
    """The fields that a model's generation_config.json may set; the defaults have no effect."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1: off.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)


class SamplingDefaults(SamplingFields):
    # Default limit of chats; completions have OpenAI's default.
    max_new_tokens: int | None = Field(None, ge=1)


def _check_token_ids(value: object) -> list[int]:
    if (token_ids := _token_ids(value)) is None:
        raise ValueError("must be a non-empty list of token ids")
    return token_ids


class GenerationRequest(SamplingFields):
    """The sampling and streaming fields of both completion APIs."""

    # These fields would change the answer. They are refused, because an answer that ignores them
    # would be wrong, and the client would not notice.
    NEUTRAL: ClassVar[Values] = dict.fromkeys(
        _names(
            "allowed_token_ids ebnf json_schema logprob_token_ids lora_path moderation "
            "prompt_embeds regex repetition_detection structural_tag truncate_prompt_tokens"
        ),
        (),
    ) | {
        "bad_words": ([],),
        "early_stopping": (False,),
        "ec_transfer_params": ({},),
        "length_penalty": (1, 1.0),
        "logits_processors": ([],),
        "return_prompt_text": (False,),
        "return_tokens_as_token_ids": (False,),
        "spaces_between_special_tokens": (True,),
        "thinking_token_budget": (-1,),
        "use_beam_search": (False,),
        "watermarking": (False,),
    }
    HINTS: ClassVar[frozenset[str]] = _names(
        "metadata prompt_cache_options prompt_cache_retention request_id return_mm_kwargs "
        "return_token_offsets routed_experts_prompt_start service_tier session_id store "
        "stream_interval truncation_side vllm_xargs"
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
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_int_keys)] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    cache_salt: Label = ""
    priority: int = Field(0, ge=-(2**63), le=2**63 - 1)
    return_token_ids: bool = False
    user: Label = ""  # this label and the next two change nothing
    safety_identifier: Label = ""
    prompt_cache_key: Label = ""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Constraints; ``engine/server/structured.py`` reads them. vLLM has removed ``guided_*``.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    resume: dict[str, Any] | None = None
    # Token ids of the prompt, if the router has tokenized it.
    prompt_token_ids: Annotated[list[int] | None, PlainValidator(_check_token_ids)] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.is_remote_prefill:
            return self
        if "stream_options" in self.model_fields_set and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {limit}", param="min_tokens"
            )
        return self

    @property
    def is_remote_prefill(self) -> bool:
        """Return True if only the first token is wanted; other fields describe the whole answer."""
        return (self.kv_transfer_params or {}).get("do_remote_decode") is True

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Return None for no logprobs, 0 for only that of the token itself."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    @property
    def is_constrained(self) -> bool:
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return bool(self.response_format or self.structured_outputs) or guided != (None,) * 4

    def kv_transfer(self) -> KVTransferParams:
        params = self.kv_transfer_params
        return KVTransferParams() if params is None else from_wire(params)

    def resumed(self) -> Resume | None:
        """Check and return ``resume``. Raises RequestError."""
        if self.resume is None:
            return None
        try:
            resume = msgspec.convert(self.resume, Resume)
        except (msgspec.ValidationError, RecursionError) as error:
            raise RequestError(f"resume: {error}", param="resume") from None
        if len(resume.choices) != self.n:
            message = f"resume has {len(resume.choices)} choices, the request n={self.n}"
            raise RequestError(message, param="resume.choices")
        return resume


Prompt = str | list[int]
_TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


def _read_prompts(value: object) -> list[Prompt]:
    """Check without pydantic, which would try a union item by item and report each failure."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of token ids, or a list of these, and not empty")
    if isinstance(value[0], int) and (token_ids := _token_ids(value)) is not None:
        return [token_ids]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    prompts = [item if isinstance(item, str) else _token_ids(item) for item in value]
    if None in prompts:
        raise ValueError("every prompt must be a string or a non-empty list of token ids")
    return cast(list[Prompt], prompts)


def _token_ids(value: object) -> list[int] | None:
    """Return ``value`` if it is a non-empty list of token ids. Checks without a Python loop."""
    try:
        return msgspec.convert(value, _TokenIds) if isinstance(value, list) and value else None
    except msgspec.ValidationError:
        return None


class CompletionRequest(GenerationRequest):
    NEUTRAL: ClassVar[Values] = GenerationRequest.NEUTRAL | {"best_of": (1,), "suffix": ("",)}

    prompt: Annotated[list[Prompt], PlainValidator(_read_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False  # the answer begins with the prompt
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.token_limit == 0 and not self.echo:
            raise RequestError(
                "max_tokens must be 1 or more without echo: true, got 0", param="max_tokens"
            )
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        both = self.prompt_logprobs is None and self.echo
        return self.logprobs if both else self.prompt_logprobs


class ChatTemplateFields(RequestBody):
    """The fields that the chat template receives, and how it is rendered."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=4096), AfterValidator(_check_size)
    ]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: Annotated[list[Tool], Field(max_length=1024)] = []

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return the variables of the template besides messages and tools, as in vLLM."""
        return self.chat_template_kwargs


class ChatCompletionRequest(ChatTemplateFields, GenerationRequest):
    NEUTRAL: ClassVar[Values] = GenerationRequest.NEUTRAL | {
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "web_search_options": (),
    }
    HINTS: ClassVar[frozenset[str]] = GenerationRequest.HINTS | _names(
        "include_reasoning media_io_kwargs mm_payload mm_processor_kwargs prediction verbosity"
    )

    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: str | None = Field(None, max_length=64)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )
        if self._named is None and self.tool_choice not in ("none", "auto", "required"):
            raise RequestError(
                'tool_choice must be "none", "auto", "required", or name a function: '
                '{"type": "function", "function": {"name": "..."}}',
                param="tool_choice",
            )
        if self.must_call and not self.callable_functions:
            name = self._named or "a function"
            raise RequestError(f"tool_choice: {name} is not among the tools", param="tool_choice")
        return self

    @property
    def _named(self) -> str | None:
        with contextlib.suppress(LookupError, TypeError):
            return cast(str, self.tool_choice["function"]["name"])
        return None

    @property
    def must_call(self) -> bool:
        return self._named is not None or self.tool_choice == "required"

    @property
    def is_constrained(self) -> bool:
        return self.must_call or super().is_constrained

    @property
    def many_calls(self) -> bool:
        return self.parallel_tool_calls and self._named is None

    @property
    def callable_functions(self) -> list[ToolFunction]:
        if self.tool_choice == "none":
            return []
        functions = [tool.function for tool in self.tools]
        return [one for one in functions if self._named in (None, one.name)]

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = self.reasoning_effort
        if effort is None:
            return self.chat_template_kwargs
        thinking = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return thinking | self.chat_template_kwargs

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeCompletionRequest(RequestBody):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatTemplateFields):
    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: list[TokenId]
