"""Converts text to token ids and back with the ``tokenizers`` library alone, because transformers
would bring torch into the process.

From what a tokenizer is made of follows how many characters one token can stand for at most. A text
of more characters than that for each token of the context does not fit, and need not be tokenized
to know it. The bound is known where it is known which characters of a text are lost: for byte-level
BPE, whose vocabulary may lack bytes, and for BPE over whole characters that falls back to bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdlaunch.errors import ConfigError

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
    """Bounds how much text one token of a tokenizer can stand for."""

    max_chars: int
    """Characters of a text as it was sent."""
    lost_chars: str = ""
    """Characters of which no token says anything."""

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that ``text`` has at least."""
        return -(-(len(text) - sum(map(text.count, self.lost_chars))) // self.max_chars)


def token_length(tokenizer: Tokenizer, byte_alphabet: Mapping[str, int]) -> TokenLength | None:
    """Return the bound, or None when there is none.

    ``byte_alphabet``: how byte-level vocabularies write the 256 bytes.
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
    """Return the settings of a component, or of those that a sequence has, in order."""
    if component is None:
        return []
    settings: dict[str, Any] = json.loads(component.__getstate__())
    return settings[name] if settings["type"] == "Sequence" else [settings]


def _keeps_normalized(part: dict[str, Any]) -> bool:
    """Tell whether no text gets shorter, but by composition."""
    if part["type"] == "Replace":
        return len(part["content"]) >= len(part["pattern"].get("String", part["content"] + " "))
    return part["type"] in _KEEPING_NORMALIZERS


def _keeps_split(part: dict[str, Any]) -> bool:
    """Tell whether nothing between the pieces is dropped."""
    return part["type"] in _KEEPING_PRE_TOKENIZERS and part.get("behavior") != "Removed"


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """Wraps the model's tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        alphabet = _byte_alphabet()
        self._byte_of_char = alphabet if _is_byte_level(tokenizer) else None
        self.token_length = token_length(tokenizer, alphabet)
        """None: nothing is known of it."""

    @classmethod
    def load(cls, model_dir: str | Path) -> TextTokenizer:
        """Read tokenizer.json of a model; raises ConfigError."""
        path = Path(model_dir) / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{path} cannot be read: {error}",
                field="model",
                value=str(model_dir),
                fix="The model needs a tokenizer.json.",
            ) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``; it may spell special tokens."""
        # encode_batch_fast, unlike encode, lets go of the GIL and computes no offsets.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        token_ids: list[int] = encoding.ids
        return token_ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of ``token_ids``; U+FFFD stands for bytes that are no valid UTF-8.

        Unknown ids give no text.
        """
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within a text.

        They are empty for ids that the tokenizer does not know.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_of_char is not None:
            return bytes(self._byte_of_char[char] for char in piece if char in self._byte_of_char)
        byte_token = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte_token[1], 16)]) if byte_token else piece.replace("▁", " ").encode()

    def token_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece or ""


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    settings = json.loads(decoder.__getstate__())
    return "ByteLevel" in [
        settings["type"],
        *(part["type"] for part in settings.get("decoders", [])),
    ]


def _byte_alphabet() -> dict[str, int]:
    """Return the printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves, the other bytes for 256, 257, ... in order.
    Source: GPT-2's byte-level BPE, as the ``tokenizers`` library's ByteLevel.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
