# ruff: noqa: T201 - part of a script
"""What an attack has found: a short table, and the promises that were broken."""

from collections import Counter

MOST_SHOWN = 20
"""Broken promises of one attack that are printed in full."""
MOST_CHARACTERS = 600


class Verdict:
    def __init__(self, attack: str) -> None:
        self.attack = attack
        self.rows: list[tuple[str, ...]] = []
        self.broken: list[tuple[str, str]] = []

    def row(self, *cells: object) -> None:
        """Add a line to the table; it is printed at once, as attacks take minutes."""
        texts = tuple(str(cell) for cell in cells)
        self.rows.append(texts)
        print(f"  {texts[0]:<34} " + " | ".join(texts[1:]), flush=True)

    def broke(self, promise: str, how: str) -> None:
        """``how``: the request or the steps, so that it can be repeated."""
        self.broken.append((promise, how))
        if len(self.broken) <= MOST_SHOWN:
            print(f"  BROKEN {promise}\n         by {how[:MOST_CHARACTERS]}", flush=True)

    def conclude(self) -> int:
        """Print the outcome; returns the exit code."""
        if not self.broken:
            print(f"{self.attack}: no promise was broken", flush=True)
            return 0
        kinds = Counter(promise for promise, _ in self.broken)
        print(f"{self.attack}: {len(self.broken)} promises were broken")
        for promise, count in kinds.most_common(MOST_SHOWN):
            print(f"  {count} x {promise}", flush=True)
        return 1
