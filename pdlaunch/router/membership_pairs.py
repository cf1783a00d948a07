"""Decides which pairs of engines are proven by canaries, and which engines may be used.

Pure: what is known of engines and pairs comes in, a verdict goes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from pdlaunch.watch.canary import Proof

MAX_PEERS = 8
"""Engines of the other role with which each is proven at most, so that the number of canaries grows
with the engines and not with their square."""

Pair = tuple[str, str]
"""Names of a prefill and a decode engine."""
Results = Mapping[Pair, Proof | str]
"""What canaries have shown: a proof, or why there is none. Pairs without a result are missing."""


class Verdict(NamedTuple):
    """Says which engines may be used."""

    ready: frozenset[str]
    reasons: Mapping[str, str]
    """The reason why each of the others may not."""


def due_pairs(prefill: Collection[str], decode: Collection[str]) -> set[Pair]:
    """Return the pairs to prove: each engine with up to ``MAX_PEERS`` of the other role.

    Engines that come or go change few of the other pairs.
    """
    pairs = {(first, second) for first in prefill for second in _nearest(first, decode)}
    return pairs | {(first, second) for second in decode for first in _nearest(second, prefill)}


def _nearest(name: str, others: Iterable[str]) -> list[str]:
    def distance(other: str) -> bytes:
        return hashlib.blake2b("\0".join(sorted((name, other))).encode(), digest_size=8).digest()

    return sorted(others, key=distance)[:MAX_PEERS]


def judge(
    prefill: Sequence[str], decode: Sequence[str], results: Results, ready_before: Collection[str]
) -> Verdict:
    """Judge healthy engines by the canaries of their due pairs.

    Of a pair that failed, the engine with more failures goes, so that one wrong engine does not
    drag its peers along. An engine that is new waits for the canaries with those that are ready;
    those that are ready do not wait for it.
    """
    due = due_pairs(prefill, decode)
    failed = {pair for pair in due if isinstance(results.get(pair), str)}
    reasons: dict[str, str] = {}
    order = [*prefill, *decode]
    while failed:
        # The last of equals: of a lone pair the prefill engine stays, which can serve alone.
        worst = max(reversed(order), key=lambda name: _blame(name, failed, due, results))
        pair = min(each for each in failed if worst in each)
        reasons[worst] = f"{pair[0]} -> {pair[1]}: {results[pair]}"
        failed = {pair for pair in failed if worst not in pair}
    left = [name for name in order if name not in reasons]
    ready = {name for name in left if name in ready_before}
    for name in left:
        missing = [
            other
            for pair in due
            if name in pair and pair not in results
            for other in pair
            if other in ready - {name}
        ]
        if name in ready or not missing:
            ready.add(name)
        else:
            reasons[name] = f"its canary with {min(missing)} is due"
    return Verdict(frozenset(ready), reasons)


def _blame(name: str, failed: set[Pair], due: set[Pair], results: Results) -> tuple[int, int]:
    """Return a key that is largest for the engine that failures are put down to."""
    num_failures = sum(name in pair for pair in failed)
    num_proofs = sum(name in pair and isinstance(results.get(pair), Proof) for pair in due)
    return (num_failures, -num_proofs)
