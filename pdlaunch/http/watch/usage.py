"""Reads what an answer of decode tells of a prompt whose KV blocks it was handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHED_AT_PREFILL = "remote_prefill_cached_tokens"
"""A parameter of prefill's answer. With it vLLM's decode engine repeats what prefill had cached,
and does not tell what it has read itself."""
NUM_BACKED_OFF_TOKENS = 16
"""Tokens at the end of a prompt that decode may compute though it has read all it can."""


def num_recomputed(answer: Mapping[str, Any]) -> int | None:
    """Return how many tokens of a prompt decode has computed though it was handed their blocks.

    None: the engine does not tell (vLLM without --enable-prompt-tokens-details), or the answer is a
    chunk before the last one. Raises LookupError, TypeError or AttributeError for what is no usage.
    """
    usage = answer.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None:
        return None
    num_tokens: int = usage["prompt_tokens"] - cached
    return num_tokens if num_tokens > NUM_BACKED_OFF_TOKENS else 0
