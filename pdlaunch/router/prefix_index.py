"""Remembers roughly which engine has served which prefix, for the next turn of a chat.

::

    first turn    [piece][piece][rest]             a client's text is cut into pieces of equal size;
    next turn     [piece][piece][piece][piece][rest]      each has the hash of all up to its end

It knows texts and not blocks, nothing of evictions, and only what went through this router: an
answer is right whatever it says, at worst an engine computes more than was thought.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import xxhash

from pdlaunch.router.engine import Engine, EngineKey

PIECE_BYTES = 128
MAX_PIECES = 2048
"""Pieces of one prompt that are looked at: what lies behind them makes little difference."""
MAX_REMEMBERED_PIECES = 32_768
"""Pieces for each engine, about 100 bytes each; the ones not used for longest are forgotten."""

PrefixHashes = tuple[int, ...]
"""The hashes of a prompt's pieces, in their order."""


def hash_prefix(text: bytes | None, cache_salt: str) -> PrefixHashes:
    """Return the hashes of a prompt or messages; the end that fills no piece has none.

    Prompts of different salts share nothing, as in the engines' caches.
    """
    if text is None:
        return ()
    running = xxhash.xxh3_64(cache_salt.encode("utf-8", "surrogatepass") + b"\0")
    hashes = []
    for number in range(min(len(text) // PIECE_BYTES, MAX_PIECES)):
        running.update(text[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
        hashes.append(running.intdigest())
    return tuple(hashes)


class ServedPrefixes:
    """A PrefixIndex of what engines have served."""

    def __init__(self, max_pieces: int = MAX_REMEMBERED_PIECES) -> None:
        self._max_pieces = max_pieces
        self._engines: dict[str, tuple[EngineKey, OrderedDict[int, int]]] = {}
        """Tokens up to the end of a piece, by engine and hash; the piece that was used
        last comes last.
        """

    def num_cached_tokens(self, engine: Engine, prefix: PrefixHashes) -> int:
        """Return how many tokens of the prefix this engine need not compute."""
        key, pieces = self._engines.get(engine.name, (None, None))
        if pieces is None or key != engine.key:
            return 0
        return next((pieces[piece] for piece in reversed(prefix) if piece in pieces), 0)

    def served(
        self, engine: Engine, prefix: PrefixHashes, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Note that an engine has the blocks of a prompt, and of the tokens that it drew after it.

        The next turn begins with them: they count as known behind the prompt's last piece.
        """
        if not prefix:
            return
        key, pieces = self._engines.get(engine.name, (engine.key, OrderedDict[int, int]()))
        if key != engine.key:
            pieces = OrderedDict()
        self._engines[engine.name] = (engine.key, pieces)
        for number, piece in enumerate(prefix, 1):
            num_tokens = num_prompt_tokens * number // (len(prefix) + 1)
            pieces[piece] = max(num_tokens, pieces.pop(piece, 0))
        pieces[prefix[-1]] = max(num_prompt_tokens + num_output_tokens, pieces[prefix[-1]])
        while len(pieces) > self._max_pieces:
            pieces.popitem(last=False)

    def keep(self, names: Iterable[str]) -> None:
        """Forget the engines that are not there any more."""
        self._engines = {name: self._engines[name] for name in names if name in self._engines}
