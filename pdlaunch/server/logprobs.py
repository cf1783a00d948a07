"""Log probabilities in the forms of the two completion APIs."""

from __future__ import annotations

from pdlaunch.protocol.engine import TokenOutput
from pdlaunch.protocol.openai.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from pdlaunch.server.choice import Delta
from pdlaunch.server.tokenizer import TextTokenizer

_LOWEST = -9999.0
"""JSON has no minus infinity; the value that OpenAI uses."""


def completion_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> CompletionLogprobs:
    """Of a delta's tokens; the drawn token is always among the top ones, so there may be ``num_top
    + 1``.
    """
    return CompletionLogprobs(
        tokens=[token_name(tokenizer.token_bytes(token.token_id)) for token in delta.tokens],
        token_logprobs=[
            None if token.logprob is None else max(token.logprob, _LOWEST) for token in delta.tokens
        ],
        top_logprobs=[
            _top_by_name(token, tokenizer, num_top) if num_top else None for token in delta.tokens
        ],
        text_offset=list(delta.text_offsets),
    )


def chat_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> ChatLogprobs:
    """Of a delta's tokens, with their bytes."""
    return ChatLogprobs(
        content=[_token_logprob(token, tokenizer, num_top) for token in delta.tokens]
    )


def token_name(token_bytes: bytes) -> str:
    """The token's text; ``bytes:\\xe4\\xbd`` where it is no whole character."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _top_by_name(token: TokenOutput, tokenizer: TextTokenizer, num_top: int) -> dict[str, float]:
    top = dict(token.top_logprobs[:num_top])
    if token.logprob is not None:
        top.setdefault(token.token_id, token.logprob)
    return {
        token_name(tokenizer.token_bytes(token_id)): max(logprob, _LOWEST)
        for token_id, logprob in top.items()
    }


def _token_logprob(token: TokenOutput, tokenizer: TextTokenizer, num_top: int) -> TokenLogprob:
    token_bytes = tokenizer.token_bytes(token.token_id)
    return TokenLogprob(
        token=token_name(token_bytes),
        logprob=_LOWEST if token.logprob is None else max(token.logprob, _LOWEST),
        bytes=list(token_bytes),
        top_logprobs=[
            _top_logprob(token_id, logprob, tokenizer)
            for token_id, logprob in token.top_logprobs[:num_top]
        ],
    )


def _top_logprob(token_id: int, logprob: float, tokenizer: TextTokenizer) -> TopLogprob:
    token_bytes = tokenizer.token_bytes(token_id)
    return TopLogprob(
        token=token_name(token_bytes), logprob=max(logprob, _LOWEST), bytes=list(token_bytes)
    )
