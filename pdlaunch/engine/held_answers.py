"""Answers that speak of a lease, until every rank has written it down.

An answer that has left promises blocks. Where these can be read after a rank's death, it leaves
only when the promise outlives the rank too.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdlaunch.protocol.engine import FirstTokens, RequestFinished, Tokens

Output = Tokens | FirstTokens | RequestFinished


def speaks_of_lease(output: Output) -> bool:
    """It promises blocks."""
    return isinstance(output, RequestFinished) and output.remote_kv is not None


class HeldAnswers:
    """Between the scheduler and the server. ``holds``: False where leases die with their rank:
    nothing waits.
    """

    def __init__(self, *, holds: bool) -> None:
        self._holds = holds
        self._held: dict[str, Output] = {}
        self._released: list[Output] = []

    @property
    def waits(self) -> bool:
        """Some answer is held."""
        return bool(self._held)

    def sift(self, outputs: Iterable[Output]) -> list[Output]:
        """What may leave now, of what was held and of ``outputs``; the rest is held from now on."""
        leaving, self._released = self._released, []
        for output in outputs:
            if self._holds and speaks_of_lease(output):
                self._held[output.request_id] = output
            else:
                leaving.append(output)
        return leaving

    def release(self, request_id: str) -> None:
        """The lease is written down by all ranks, or over: its answer may leave. Unknown ids are
        ignored.
        """
        held = self._held.pop(request_id, None)
        if held is not None:
            self._released.append(held)

    def clear(self) -> None:
        """Nobody waits for the answers any more."""
        self._held.clear()
        self._released.clear()
