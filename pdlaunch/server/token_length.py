"""How many characters of a text one token can stand for at most, worked out once from what a tokenizer is made of.

A text of more characters than that for each token of the context does not fit, and need not be tokenized to know it. This holds
where no character of a text is lost: byte-level BPE, and BPE over whole characters that falls back to bytes. Of other tokenizers,
and of added tokens that swallow the blanks around them, nothing is promised.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

COMPOSED_CHARS = 4
"""Characters that NFC and NFKC make one of, at most: no canonical decomposition is longer (Unicode's stability policy)."""

_KEEPING_NORMALIZERS = {"NFC", "NFKC", "NFD", "NFKD", "Prepend", "Replace", "Lowercase", "ByteLevel"}
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}


def max_chars_per_token(tokenizer: Tokenizer, byte_alphabet: str) -> int | None:
    """The bound, or None when there is none. ``byte_alphabet``: how a byte-level vocabulary writes the 256 bytes."""
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    normalizers = _parts(tokenizer.normalizer, "normalizers")
    pre_tokenizers = _parts(tokenizer.pre_tokenizer, "pretokenizers")
    if not (all(map(_keeps_normalized, normalizers)) and all(map(_keeps_split, pre_tokenizers))):
        return None
    vocabulary = tokenizer.get_vocab()
    is_byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *pre_tokenizers))
    bytes_written = list(byte_alphabet) if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizer.model
    if type(model).__name__ != "BPE" or not (is_byte_level or model.byte_fallback):
        return None
    if not all(name in vocabulary for name in bytes_written):
        return None
    longest = max(map(len, (*vocabulary, *(token.content for token in added))))
    composes = any(part["type"] in ("NFC", "NFKC") for part in normalizers)
    return longest * (COMPOSED_CHARS if composes else 1)


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a component, or of those that a sequence has, in order."""
    if component is None:
        return []
    settings: dict[str, Any] = json.loads(component.__getstate__())
    return settings[name] if settings["type"] == "Sequence" else [settings]


def _keeps_normalized(part: dict[str, Any]) -> bool:
    """No text gets shorter, but by composition."""
    if part["type"] == "Replace":
        return len(part["content"]) >= len(part["pattern"].get("String", part["content"] + " "))
    return part["type"] in _KEEPING_NORMALIZERS


def _keeps_split(part: dict[str, Any]) -> bool:
    """Nothing between the pieces is dropped."""
    return part["type"] in _KEEPING_PRE_TOKENIZERS and part.get("behavior") != "Removed"
