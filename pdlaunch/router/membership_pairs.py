"""Decides which pairs of engines are proven by canaries, and which engines may be used.

Pure: what is known of engines and pairs comes in, a verdict goes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pdlaunch.http.watch.canary import Proof
from pdlaunch.protocol.due_pairs import Pair, due_pairs

Results = Mapping[Pair, Proof | str]
"""Outcomes of canaries: a proof, or the reason why there is none. Pairs without one are missing."""


class Verdict(NamedTuple):
    """Says which engines may be used."""

    ready: frozenset[str]
    reasons: Mapping[str, str]
    """The reason why each of the others may not."""


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
    due_of: dict[str, list[Pair]] = defaultdict(list)
    for pair in due:
        for name in pair:
            due_of[name].append(pair)
    reasons: dict[str, str] = {}
    order = [*prefill, *decode]
    while failed:
        # The last of equals: of a lone pair the prefill engine stays, which can serve alone.
        worst = max(reversed(order), key=lambda name: _blame(due_of[name], failed, results))
        pair = min(each for each in failed if worst in each)
        reasons[worst] = f"{pair[0]} -> {pair[1]}: {results[pair]}"
        failed = {pair for pair in failed if worst not in pair}
    left = [name for name in order if name not in reasons]
    ready = {name for name in left if name in ready_before}
    for name in left:
        missing = [
            other
            for pair in due_of[name]
            if pair not in results
            for other in pair
            if other != name and other in ready
        ]
        if name in ready or not missing:
            ready.add(name)
        else:
            reasons[name] = f"its canary with {min(missing)} is due"
    return Verdict(frozenset(ready), reasons)


def _blame(due: Sequence[Pair], failed: Collection[Pair], results: Results) -> tuple[int, int]:
    """Return a key that is largest for the engine that failures are put down to.

    ``due``: the pairs of the engine.
    """
    num_failures = sum(pair in failed for pair in due)
    num_proofs = sum(isinstance(results.get(pair), Proof) for pair in due)
    return (num_failures, -num_proofs)
