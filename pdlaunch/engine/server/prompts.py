"""Converts text to token ids: prompts of requests, and /tokenize and /detokenize.

A prompt that cannot fit is refused before work is done for it. All of this runs in threads too.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import num_token_ids, parse_request, read_json_object
from pdlaunch.protocol.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from pdlaunch.protocol.openai.responses import DetokenizeResponse, TokenizeResponse

MIN_TEXT_CHARS = 2**18
TEXT_CHARS_PER_TOKEN = 8
"""A text may be longer than the context, so that its client learns by how much."""
MIN_TOKEN_IDS = 2**16


class Converted(NamedTuple):
    """Holds the body that answers /tokenize or /detokenize."""

    answer: bytes
    ignored_fields: tuple[str, ...]


def tokenize(raw: bytes, model: ServedModel, strict_fields: bool) -> Converted:
    """Answer the body of a /tokenize request. Raises RequestError."""
    body = read_json_object(raw)
    max_chars = max(MIN_TEXT_CHARS, TEXT_CHARS_PER_TOKEN * model.max_model_len)
    request: TokenizeCompletionRequest | TokenizeChatRequest
    if "messages" in body:
        request = parse_request(TokenizeChatRequest, body, public=True, strict_fields=strict_fields)
        text = render_chat(request, model, max_chars=max_chars)
    else:
        request = parse_request(
            TokenizeCompletionRequest, body, public=True, strict_fields=strict_fields
        )
        text = request.prompt
        if len(text) > max_chars:
            raise RequestError(
                f"prompt has {len(text)} characters; at most {max_chars} are tokenized at a time",
                param="prompt",
            )
    model.check_name(request.model)
    tokens = model.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
    pieces = (
        [model.tokenizer.token_piece(token) for token in tokens]
        if request.return_token_strs
        else None
    )
    answer = TokenizeResponse(
        count=len(tokens), max_model_len=model.max_model_len, tokens=tokens, token_strs=pieces
    )
    return Converted(msgspec.json.encode(answer), request.ignored_fields)


def detokenize(raw: bytes, model: ServedModel, strict_fields: bool) -> Converted:
    """Answer the body of a /detokenize request. Raises RequestError."""
    num_ids, max_ids = num_token_ids(raw, "tokens"), max(MIN_TOKEN_IDS, model.max_model_len)
    if num_ids > max_ids:
        raise RequestError(
            f"tokens has {num_ids} token ids; at most {max_ids} are detokenized at a time",
            param="tokens",
        )
    request = parse_request(
        DetokenizeRequest, read_json_object(raw), public=True, strict_fields=strict_fields
    )
    model.check_name(request.model)
    model.check_token_ids(request.tokens, "tokens")
    text = model.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return Converted(msgspec.json.encode(DetokenizeResponse(prompt=text)), request.ignored_fields)


PROBED_CHARS_PER_TOKEN = 16
"""Characters, for each token of the context, that are tokenized first of a very long text. Text
that just fills the context has about a third as many.
"""


def read_completion(raw: bytes, model: ServedModel, strict_fields: bool) -> CompletionRequest:
    """Check a body; raises RequestError."""
    num_tokens = num_token_ids(raw, "prompt") if len(raw) > model.max_model_len else 0
    if num_tokens >= model.max_model_len:
        raise model.too_long(f"has {num_tokens} tokens", "prompt")
    request = parse_request(
        CompletionRequest, read_json_object(raw), public=False, strict_fields=strict_fields
    )
    model.check_name(request.model)
    return request


def read_chat(raw: bytes, model: ServedModel, strict_fields: bool) -> ChatCompletionRequest:
    """Check a body; raises RequestError."""
    request = parse_request(
        ChatCompletionRequest, read_json_object(raw), public=False, strict_fields=strict_fields
    )
    model.check_name(request.model)
    return request


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Return one list for each prompt; token ids are taken as they are. Raises RequestError."""
    return [
        _encode(prompt, model, "prompt", request.add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in request.prompts
    ]


def chat_prompt(request: ChatCompletionRequest, model: ServedModel) -> list[int]:
    """Return the messages, rendered by the model's chat template. Raises RequestError."""
    text = render_chat(request, model, max_chars=model.max_prompt_chars)
    return _encode(text, model, "messages", request.add_special_tokens)


def render_chat(
    request: ChatCompletionRequest | TokenizeChatRequest, model: ServedModel, *, max_chars: int
) -> str:
    """Return the text of a chat's prompt. Raises RequestError."""
    if model.chat_template is None:
        raise RequestError(
            f"the model {model.name!r} has no chat template; use /v1/completions", param="messages"
        )
    return model.chat_template.render(
        [message.for_template() for message in request.messages],
        tools=[tool.for_template() for tool in request.tools],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=request.template_variables,
        max_chars=max_chars,
    )


def _encode(text: str, model: ServedModel, param: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text.

    Tokenizing takes 100 bytes for each character, so of a very long text a part is tried first.
    """
    length = model.tokenizer.token_length
    if length is not None and len(text) > model.max_prompt_chars:
        num_tokens = length.fewest_tokens(text)
        if num_tokens >= model.max_model_len:
            raise model.too_long(
                f"has {len(text)} characters, which are {num_tokens} tokens or more", param
            )
    num_probed = PROBED_CHARS_PER_TOKEN * model.max_model_len
    if len(text) > 2 * num_probed:
        num_tokens = len(model.tokenizer.encode(text[:num_probed], add_special_tokens=False))
        # Where the text was cut, tokens differ from those of all of it, by far fewer than the
        # context has.
        if num_tokens > 2 * model.max_model_len:
            raise model.too_long(f"has more than {num_tokens // 2} tokens", param)
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
