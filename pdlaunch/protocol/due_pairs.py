"""Chooses which prefill and decode engines exchange KV blocks in a large deployment.

Each pair costs a handshake and a proof. The number of chosen pairs grows linearly with the engines.
"""

import bisect
import hashlib
from collections.abc import Collection, Iterator

MAX_PEERS = 8  # engines of the other role that an engine chooses; others may choose it as well

Pair = tuple[str, str]  # names of a prefill and a decode engine


def due_pairs(prefill: Collection[str], decode: Collection[str]) -> set[Pair]:
    """Return the pairs to use. Each engine has at least ``MAX_PEERS`` peers, or all engines of the
    other role. An engine that comes or goes changes few pairs of the others.
    """
    pairs = set(_followers(prefill, decode))
    return pairs | {(first, second) for second, first in _followers(decode, prefill)}


def _followers(names: Collection[str], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each name with the ``MAX_PEERS`` others that follow it on a ring ordered by hashes."""
    ring = sorted((_place(other), other) for other in others)
    for name in names:
        first = bisect.bisect(ring, (_place(name), name))
        for step in range(min(MAX_PEERS, len(ring))):
            yield name, ring[(first + step) % len(ring)][1]


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
