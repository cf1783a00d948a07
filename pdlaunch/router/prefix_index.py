"""Remembers roughly which engine has served which prefix, for the next turn of a chat.

::

    first turn    [piece][piece][end of a message]
    next turn     [piece][piece][end of a message][piece][rest]

Each piece has the hash of the text up to its end. The index knows texts, not blocks, and only those
of this router. A wrong entry costs time, never a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import xxhash

from pdlaunch.router.engine import Engine, Processes

PIECE_BYTES = 128
# A piece has at least a 256th of the bytes before it: ``MAX_PIECES`` cover a million tokens.
PIECE_SHARE = 256
# A message ends like this in most clients' JSON. Pieces end there too, so that a chat with a short
# question is told apart from others with the same system prompt.
MESSAGE_END = b'"}'
# No shorter pieces, which would end at objects inside a message. Grows with the size of pieces.
LEAST_MESSAGE_BYTES = 24
MAX_PIECES = 2048  # pieces of one prompt that are looked at
# Pieces for each engine, about 200 bytes each; the ones not used for longest are forgotten.
MAX_REMEMBERED_PIECES = 32_768


class Piece(NamedTuple):
    """Stands for a prompt's text up to the end of one of its pieces."""

    hash: int
    share: float  # share of the whole text


PrefixHashes = tuple[Piece, ...]  # the pieces of a prompt, in their order


def hash_prefix(text: bytes | None, cache_salt: str) -> PrefixHashes:
    """Return the whole pieces of a prompt; prompts of different salts share none."""
    if text is None:
        return ()
    running = xxhash.xxh3_64(cache_salt.encode("utf-8", "surrogatepass") + b"\0")
    pieces: list[Piece] = []
    begin = 0
    while len(pieces) < MAX_PIECES:
        size = max(PIECE_BYTES, begin // PIECE_SHARE)
        least = LEAST_MESSAGE_BYTES * size // PIECE_BYTES
        found = text.find(MESSAGE_END, begin + least, begin + size)
        end = begin + size if found < 0 else found + len(MESSAGE_END)
        if end > len(text):
            break
        running.update(text[begin:end])
        pieces.append(Piece(running.intdigest(), end / len(text)))
        begin = end
    return tuple(pieces)


class ServedPrefixes:
    """Remembers which prefixes each engine has served."""

    def __init__(self, max_pieces: int = MAX_REMEMBERED_PIECES) -> None:
        self._max_pieces = max_pieces
        # Tokens up to the end of a piece, by engine and hash; the least recently used first.
        self._engines: dict[str, tuple[Processes, OrderedDict[int, int]]] = {}

    def num_cached_tokens(self, engine: Engine, prefix: PrefixHashes) -> int:
        """Return how many tokens of the prefix this engine need not compute."""
        processes, pieces = self._engines.get(engine.name, (None, None))
        if pieces is None or processes != engine.processes:
            return 0
        return next((pieces[piece.hash] for piece in reversed(prefix) if piece.hash in pieces), 0)

    def served(
        self, engine: Engine, prefix: PrefixHashes, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        if not prefix:
            return
        processes, pieces = self._engines.get(engine.name, ((), OrderedDict[int, int]()))
        if processes != engine.processes:
            pieces = OrderedDict()
        self._engines[engine.name] = (engine.processes, pieces)
        for piece in prefix:
            num_tokens = int(num_prompt_tokens * piece.share)
            pieces[piece.hash] = max(num_tokens, pieces.pop(piece.hash, 0))
        if len(prefix) < MAX_PIECES:
            # The next turn of a chat contains the output, so count the output after the last piece.
            last = prefix[-1].hash
            pieces[last] = max(num_prompt_tokens + num_output_tokens, pieces[last])
        while len(pieces) > self._max_pieces:
            pieces.popitem(last=False)

    def keep(self, names: Iterable[str]) -> None:
        self._engines = {name: self._engines[name] for name in names if name in self._engines}
