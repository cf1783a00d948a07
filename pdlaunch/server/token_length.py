"""How many characters of a text one token can stand for at most, worked out once from what a
tokenizer is made of.

A text of more characters than that for each token of the context does not fit, and need not be
tokenized to know it. This holds where it is known which characters of a text are lost: for
byte-level BPE, whose vocabulary may lack bytes, and for BPE over whole characters that falls back
to bytes. Of other tokenizers, and of added tokens that swallow the blanks around them, nothing is
promised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

COMPOSED_CHARS = 4
"""Characters that NFC and NFKC make one of, at most: no canonical decomposition is longer
(Unicode's stability policy).
"""

_KEEPING_NORMALIZERS = {
    "NFC",
    "NFKC",
    "NFD",
    "NFKD",
    "Prepend",
    "Replace",
    "Lowercase",
    "ByteLevel",
}
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}


@dataclass(frozen=True, slots=True)
class TokenLength:
    """The longest token of a tokenizer."""

    max_chars: int
    """Of a text as it was sent."""
    lost_chars: str = ""
    """Characters of which no token says anything."""

    def fewest_tokens(self, text: str) -> int:
        """No fewer tokens than these can stand for ``text``."""
        return -(-(len(text) - sum(map(text.count, self.lost_chars))) // self.max_chars)


def token_length(tokenizer: Tokenizer, byte_alphabet: Mapping[str, int]) -> TokenLength | None:
    """The bound, or None when there is none. ``byte_alphabet``: how byte-level vocabularies write
    the 256 bytes.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    normalizers = _parts(tokenizer.normalizer, "normalizers")
    pre_tokenizers = _parts(tokenizer.pre_tokenizer, "pretokenizers")
    model = tokenizer.model
    if not (
        type(model).__name__ == "BPE"
        and all(map(_keeps_normalized, normalizers))
        and all(map(_keeps_split, pre_tokenizers))
        and not any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    vocabulary = tokenizer.get_vocab()
    lost = ""
    if any(part["type"] == "ByteLevel" for part in (*normalizers, *pre_tokenizers)):
        # A character beyond ASCII keeps the bytes after its first one, as long as the vocabulary
        # has all of those.
        missing = [byte for name, byte in byte_alphabet.items() if name not in vocabulary]
        lost = "".join(chr(byte) for byte in missing if byte < 0x80)
        if not all(byte < 0x80 or byte >= 0xC0 for byte in missing):
            return None
    elif not (model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))):
        return None
    longest = max(map(len, (*vocabulary, *(token.content for token in added))))
    composes = any(part["type"] in ("NFC", "NFKC") for part in normalizers)
    return TokenLength(longest * (COMPOSED_CHARS if composes else 1), lost)


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
