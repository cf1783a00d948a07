"""Converts text to token ids and back with the ``tokenizers`` library alone, because transformers
would bring torch into the process.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from pdlaunch.errors import ConfigError

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
        self._byte_of_char = _byte_alphabet() if _is_byte_level(tokenizer) else None

    @classmethod
    def load(cls, model_dir: str | Path) -> TextTokenizer:
        """Read tokenizer.json of a model. Raises ConfigError."""
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
        """Return the bytes that a token stands for within a text; none for unknown ids."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.token_piece(token_id)
        if self._byte_of_char is not None:
            return bytes(self._byte_of_char[char] for char in piece if char in self._byte_of_char)
        byte_token = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte_token[1], 16)]) if byte_token else piece.replace("▁", " ").encode()

    def token_name(self, token_id: int) -> str:
        """Return the token's text; ``bytes:\\xe4\\xbd`` where it is no whole character."""
        token_bytes = self.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def token_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece or ""


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    settings = json.loads(tokenizer.decoder.__getstate__())
    parts = [settings, *settings.get("decoders", [])]
    return any(part["type"] == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """Return the printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves, the other bytes for 256, 257, ... in order.
    Source: GPT-2's byte-level BPE, as the ``tokenizers`` library's ByteLevel.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
