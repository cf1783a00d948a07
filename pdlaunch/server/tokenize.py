"""/tokenize and /detokenize: from the bytes of a body to the answer. All of it runs in threads
too.
"""

from __future__ import annotations

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.body import num_token_ids, parse_request, read_json_object
from pdlaunch.protocol.openai.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from pdlaunch.server.prompts import render_chat
from pdlaunch.server.served_model import ServedModel

MIN_TEXT_CHARS = 2**18
TEXT_CHARS_PER_TOKEN = 8
"""A text may be longer than the context, so that its client learns by how much."""
MIN_TOKEN_IDS = 2**16


def tokenize(raw: bytes, model: ServedModel) -> bytes:
    """The body of the answer. Raises RequestError."""
    body = read_json_object(raw)
    max_chars = max(MIN_TEXT_CHARS, TEXT_CHARS_PER_TOKEN * model.max_model_len)
    request: TokenizeCompletionRequest | TokenizeChatRequest
    if "messages" in body:
        request = parse_request(TokenizeChatRequest, body, public=True)
        text = render_chat(request, model, max_chars=max_chars)
    else:
        request = parse_request(TokenizeCompletionRequest, body, public=True)
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
    return msgspec.json.encode(answer)


def detokenize(raw: bytes, model: ServedModel) -> bytes:
    """The body of the answer. Raises RequestError."""
    num_ids, max_ids = num_token_ids(raw, "tokens"), max(MIN_TOKEN_IDS, model.max_model_len)
    if num_ids > max_ids:
        raise RequestError(
            f"tokens has {num_ids} token ids; at most {max_ids} are detokenized at a time",
            param="tokens",
        )
    request = parse_request(DetokenizeRequest, read_json_object(raw), public=True)
    model.check_name(request.model)
    model.check_token_ids(request.tokens, "tokens")
    return msgspec.json.encode(
        DetokenizeResponse(prompt=model.tokenizer.decode(request.tokens, skip_special_tokens=False))
    )
