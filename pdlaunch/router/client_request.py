"""Parses the parts of a client's request that the router needs, and makes the bodies for engines.

The router checks only the fields that it replaces. The engines check all others.
"""

import re
import secrets
from typing import Annotated, Any, NamedTuple

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.http.canary import REMOTE_DECODE
from pdlaunch.http.errors import model_not_found
from pdlaunch.http.headers import ORIGIN_HEADER, format_origin
from pdlaunch.protocol.ids import HopId, HttpRequestId, PromptOrigin
from pdlaunch.protocol.openai.body import (
    TOKEN_IDS,
    check_num_values,
    read_json_object,
    refuse_internal_fields,
)
from pdlaunch.protocol.openai.requests import MAX_CHOICES, MAX_PROMPTS

CHARACTERS_PER_TOKEN = 4  # rough; used only to compare the load of engines
DATA_URL_TOKENS = 1024  # rough, too
# An image or another file. Its number of tokens does not depend on the length of its text.
_DATA_URL = re.compile(rb'"data:[^"]{256,}"')
_PROMPTS = re.compile(rb'\s*\[\s*["\[]')  # the beginning of a list of prompts
# Long members, which the router forwards unparsed and the engines check.
_TEXTS = ("messages", "prompt")
# Charged in advance for an answer that the client does not limit.
_UNLIMITED_ANSWER_TOKENS = 1024
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_NotNegative = Annotated[int, msgspec.Meta(ge=0)]
# As in vLLM; msgspec's own bounds must fit an integer of 64 bits.
_Priority = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Endpoint(NamedTuple):
    path: str
    id_prefix: str
    chunk_object: str
    answer_object: str
    is_chat: bool


COMPLETIONS = Endpoint("/v1/completions", "cmpl-", "text_completion", "text_completion", False)
CHAT = Endpoint(
    "/v1/chat/completions", "chatcmpl-", "chat.completion.chunk", "chat.completion", True
)


class StreamFields(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ClientFields(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamFields | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: _NotNegative | None = None
    max_completion_tokens: _Positive | None = None
    min_tokens: _NotNegative | None = None
    seed: int | None = None
    priority: _Priority | None = None
    return_token_ids: bool | None = None


class PromptRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Holds one prompt of a client's request, from which the requests to engines are made."""

    endpoint: Endpoint
    body: dict[str, Any]  # the client's body, with this prompt only and a seed
    index: int
    num_choices: int
    max_tokens: int | None
    num_prompt_tokens: int  # estimate
    hop_id: HopId
    headers: dict[str, str]
    origin: PromptOrigin
    wants_pair: bool  # the client has asked for a pair of engines
    # Ask engines for token ids. With token ids, vLLM leaves out the text of an echoed prompt.
    asks_token_ids: bool
    session: str = ""  # requests of one session go to the same engines
    priority: int = 0  # lower values first

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def text(self) -> msgspec.Raw | None:
        """Return the prompt or the messages as the client wrote them."""
        text = self.body.get("messages" if self.endpoint.is_chat else "prompt")
        return text if isinstance(text, msgspec.Raw) else None

    @property
    def alone(self) -> str:
        """Return why two engines of vLLM cannot share the request; empty if they can."""
        body = self.body
        if self.num_choices > 1:  # the first choice that has read a lease ends it
            return "several choices cannot read one lease"
        if body.get("use_beam_search"):
            return "a beam search cannot read a lease"
        if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs")):
            return "log probabilities of the prompt are not handed over"
        return ""

    def prefill_body(self, *, knows_whole_request: bool, sends_first_token: bool = True) -> bytes:
        """Return a body that asks for the first token of each choice, which the client may get, and
        a lease on the blocks. ``knows_whole_request``: the engine is native. It accepts fields that
        contradict ``max_tokens=1``, and needs them to find where the first token's text may end.
        """
        sends_ids = bool(self.body.get("return_token_ids"))
        body = self.body | {
            "stream": False,
            "max_tokens": 1,
            # With token ids, vLLM sends the whole prompt back.
            "return_token_ids": self.asks_token_ids if sends_first_token else sends_ids,
            "kv_transfer_params": REMOTE_DECODE,
        }
        body.pop("stream_options", None)
        if body.get("max_completion_tokens") is not None:
            # Engines prefer this field to ``max_tokens``: prefill would compute the whole answer.
            body["max_completion_tokens"] = 1
        if body.get("min_tokens") is not None and not knows_whole_request:
            body["min_tokens"] = min(1, body["min_tokens"])
        return msgspec.json.encode(body)

    def decode_body(self, extra: dict[str, Any], *, is_whole: bool = False) -> bytes:
        stream = {} if is_whole else {"stream": True, "stream_options": {"include_usage": True}}
        own = {"return_token_ids": self.asks_token_ids, **stream, **extra}
        return msgspec.json.encode(self.body | own)

    def check_length(self, num_prompt_tokens: int, limit: int | None) -> None:
        # Prefill cannot check this: it gets ``max_tokens=1``.
        if limit and self.max_tokens and num_prompt_tokens + self.max_tokens > limit:
            message = (
                f"the prompt's {num_prompt_tokens} tokens and max_tokens={self.max_tokens} exceed "
                f"this model's maximum context length of {limit} tokens"
            )
            raise RequestError(message, param="max_tokens", code="context_length_exceeded")


class ClientRequest(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: Endpoint
    request_id: HttpRequestId
    model: str
    fields: ClientFields
    prompts: list[PromptRequest]

    @property
    def num_output_tokens(self) -> int:
        each = self.prompts[0]
        most = each.num_choices * (each.max_tokens or _UNLIMITED_ANSWER_TOKENS)
        return most * len(self.prompts)


def read_client_request(
    endpoint: Endpoint,
    raw: bytes,
    *,
    served_model_name: str,
    request_id: HttpRequestId,
    hop_id: HopId,
    headers: dict[str, str],
    wants_pair: bool = False,
    session: str = "",
    is_vllm: bool = False,
    is_fair: bool = False,
) -> ClientRequest:
    """Check a client's body and split it into prompts. Raises RequestError.

    ``is_vllm``: engines may serve models that the router does not know, and get a seed only from
    the client. ``is_fair``: the router orders each key's prompts by priority; engines get none, as
    they would order the prompts of all keys.
    """
    body = _read_body(raw)
    refuse_internal_fields(body)
    fields = _read_fields(body)
    if is_fair:
        body.pop("priority", None)
    if fields.model not in (None, served_model_name) and not is_vllm:
        raise model_not_found(str(fields.model), served_model_name)
    # With ``echo``, a client may ask for the prompt's log probabilities and no output tokens.
    echoes = not endpoint.is_chat and bool(body.get("echo"))
    max_tokens = _check_limits(fields, may_be_none=echoes)
    bodies = [body] if endpoint.is_chat else [body | one for one in _split_prompts(body)]
    text, prompts = "messages" if endpoint.is_chat else "prompt", []
    for index, one in enumerate(bodies):
        if fields.seed is None and not is_vllm:
            # Set one seed for the prompt, so that every engine samples the same tokens.
            one["seed"] = secrets.randbits(63)
        origin = PromptOrigin(secrets.randbelow(2**63 - 1) + 1)
        prompts.append(
            PromptRequest(
                endpoint=endpoint,
                origin=origin,
                body=one,
                index=index,
                num_choices=fields.n or 1,
                max_tokens=max_tokens,
                num_prompt_tokens=_estimate_tokens(one.get(text)),
                hop_id=hop_id if len(bodies) == 1 else HopId(f"{hop_id}-{index}"),
                headers=headers | {ORIGIN_HEADER: format_origin(origin)},
                wants_pair=wants_pair,
                session=session,
                priority=fields.priority or 0,
                asks_token_ids=not (is_vllm and echoes) or bool(fields.return_token_ids),
            )
        )
    return ClientRequest(
        endpoint=endpoint,
        request_id=request_id,
        model=fields.model or served_model_name,
        fields=fields,
        prompts=prompts,
    )


def _read_body(raw: bytes) -> dict[str, Any]:
    """Parse a client's body, but keep messages and prompts as raw JSON. Raises RequestError."""
    check_num_values(raw)
    try:
        members = _members_decoder.decode(raw)
    except (ValueError, RecursionError):
        return read_json_object(raw)
    texts = {name: members.pop(name) for name in _TEXTS if name in members}
    return read_json_object(msgspec.json.encode(members)) | texts


def _read_fields(body: dict[str, Any]) -> ClientFields:
    try:
        return msgspec.convert(body, ClientFields)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`") or None
        raise _invalid(f"{field}: {text}" if field else text, field) from None


def _check_limits(fields: ClientFields, *, may_be_none: bool) -> int | None:
    """Return the client's limit of output tokens, if any. Raises RequestError."""
    if fields.max_tokens == 0 and not may_be_none:
        raise _invalid("max_tokens must be 1 or more, or 0 with echo: true", "max_tokens")
    if fields.stream_options is not None and not fields.stream:
        raise _invalid("stream_options needs stream: true", "stream_options")
    limit = fields.max_completion_tokens or fields.max_tokens
    if limit is not None and (fields.min_tokens or 0) > limit:
        message = f"min_tokens {fields.min_tokens} is more than max_tokens {limit}"
        raise _invalid(message, "min_tokens")
    return None if limit is None else max(1, limit)  # 1, so that one engine does all the work


def _split_prompts(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``{"prompt": ..}`` for each prompt, unchecked. Raises RequestError."""
    prompt = body.get("prompt")
    if body.get("prompt_embeds"):
        message = "prompt_embeds is not supported; send the prompt's text or token ids"
        raise RequestError(message, param="prompt_embeds", code="unsupported_parameter")
    prompts = [prompt]
    if prompt is not None and _PROMPTS.match(prompt):
        prompts = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    if len(prompts) > MAX_PROMPTS:
        raise _invalid(f"prompt: at most {MAX_PROMPTS} prompts in one request", "prompt")
    return [{"prompt": one} for one in prompts]


def _estimate_tokens(text: msgspec.Raw | None) -> int:
    if text is None:
        return 1
    raw = bytes(text)
    if TOKEN_IDS.match(raw):
        return 1 + raw.count(b",")
    raw, num_files = _DATA_URL.subn(b"", raw)
    return 1 + len(raw) // CHARACTERS_PER_TOKEN + num_files * DATA_URL_TOKENS


def _invalid(message: str, param: str | None) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")
