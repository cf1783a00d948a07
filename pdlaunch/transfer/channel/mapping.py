"""Which rank pulls which KV heads from which rank, for any two TP sizes.

::

    6 heads, holder tp 2:   | 0 1 2 | 3 4 5 |
             puller tp 3:   | 0 1 | 2 3 | 4 5 |      puller 1 pulls head 2 from holder 0 and head 3 from holder 1

Where the TP size exceeds the number of KV heads, a head is replicated on ``tp_size / num_kv_heads``
neighbouring ranks, and the pullers of that head are spread over its replicas. A replica that nobody
needs is still visited by one puller, without heads, so that its lease ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pdlaunch.errors import HandshakeError


@dataclass(frozen=True, slots=True)
class Source:
    """One holder rank that a puller rank turns to."""

    tp_rank: int
    """Of the holder."""
    heads: range
    """Global indices of the KV heads to pull; empty: only begin and end, so that the holder's lease
    ends.
    """
    num_pullers: int
    """Puller ranks that turn to this holder rank for one reader."""


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """Global indices of the KV heads that a rank holds. Raises HandshakeError when the heads cannot
    be shared out evenly.
    """
    if tp_size <= num_kv_heads and num_kv_heads % tp_size == 0:
        share = num_kv_heads // tp_size
        return range(tp_rank * share, (tp_rank + 1) * share)
    if tp_size > num_kv_heads > 0 and tp_size % num_kv_heads == 0:
        head = tp_rank // (tp_size // num_kv_heads)
        return range(head, head + 1)
    raise HandshakeError(
        f"tensor_parallel_size {tp_size} does not fit {num_kv_heads} KV heads: one must divide the "
        "other"
    )


@cache
def map_sources(
    *, num_kv_heads: int, holder_tp_size: int, puller_tp_size: int, puller_tp_rank: int
) -> tuple[Source, ...]:
    """The holder ranks that one puller rank turns to, in ascending order; their heads are disjoint
    and cover the puller's own.

    Raises HandshakeError when a TP size does not fit the number of heads.
    """
    mapping = _Mapping(num_kv_heads, holder_tp_size, puller_tp_size)
    sources = []
    for holder in range(holder_tp_size):
        pullers = mapping.pullers(holder)
        visitors = pullers or [mapping.visitor(holder)]
        if puller_tp_rank in visitors:
            heads = mapping.shared_heads(holder, puller_tp_rank) if pullers else range(0)
            sources.append(Source(holder, heads, len(visitors)))
    return tuple(sources)


@dataclass(frozen=True, slots=True)
class _Mapping:
    num_kv_heads: int
    holder_tp_size: int
    puller_tp_size: int

    def pullers(self, holder: int) -> list[int]:
        """Puller ranks that read heads of this holder rank."""
        return [
            puller
            for puller in range(self.puller_tp_size)
            if self.shared_heads(holder, puller)
            and self._holder_replica(holder)
            == self._puller_replica(puller) * self._holder_replicas // self._puller_replicas
        ]

    def visitor(self, holder: int) -> int:
        """The puller rank that ends the lease of a replica which nobody reads."""
        replica = self._holder_replica(holder) * self._puller_replicas // self._holder_replicas
        return next(
            puller
            for puller in range(self.puller_tp_size)
            if self.shared_heads(holder, puller) and self._puller_replica(puller) == replica
        )

    def shared_heads(self, holder: int, puller: int) -> range:
        held = heads_of_rank(self.num_kv_heads, self.holder_tp_size, holder)
        wanted = heads_of_rank(self.num_kv_heads, self.puller_tp_size, puller)
        start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
        return range(start, max(start, stop))

    @property
    def _holder_replicas(self) -> int:
        return max(1, self.holder_tp_size // self.num_kv_heads)

    @property
    def _puller_replicas(self) -> int:
        return max(1, self.puller_tp_size // self.num_kv_heads)

    def _holder_replica(self, holder: int) -> int:
        return holder % self._holder_replicas

    def _puller_replica(self, puller: int) -> int:
        return puller % self._puller_replicas
