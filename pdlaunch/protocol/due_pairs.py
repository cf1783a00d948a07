"""Chooses which prefill and decode engines hand KV blocks to each other, where there are many.

Each pair costs a handshake and a proof. Their number grows with the engines, not with their square.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Collection, Iterator

MAX_PEERS = 8  # engines of the other role that an engine chooses; more may have chosen it

Pair = tuple[str, str]  # names of a prefill and a decode engine


def due_pairs(prefill: Collection[str], decode: Collection[str]) -> set[Pair]:
    """Return the pairs that are used: each engine with at least ``MAX_PEERS`` of the other role, or
    all of it. Engines that come or go change few of the other pairs.
    """
    pairs = set(_followers(prefill, decode))
    return pairs | {(first, second) for second, first in _followers(decode, prefill)}


def _followers(names: Collection[str], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each name with the others that come next on a ring, on which hashes place them."""
    ring = sorted((_place(other), other) for other in others)
    for name in names:
        first = bisect.bisect(ring, (_place(name), name))
        for step in range(min(MAX_PEERS, len(ring))):
            yield name, ring[(first + step) % len(ring)][1]


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
