"""Maps the ranks of a decode engine to the prefill ranks that they pull their KV heads from.

::

    6 heads, prefill TP 2:  | 0 1 2 | 3 4 5 |
              decode TP 3:  | 0 1 | 2 3 | 4 5 |     rank 1 pulls head 2 from rank 0, head 3 from 1

Where the TP size exceeds the number of KV heads, ``tp_size / num_kv_heads`` neighbouring ranks hold
replicas of each head, and the decode ranks that want this head are spread over them. One decode
rank still visits a replica that nobody needs, without reading, so that the lease there ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pdlaunch.errors import HandshakeError


@dataclass(frozen=True, slots=True)
class SourceRank:
    """Names a prefill rank that a decode rank turns to, and what it reads there."""

    tp_rank: int
    """TP rank within the prefill engine."""
    heads: range
    """Global indices of the KV heads to pull. Empty: only begin and end the pull, so that the lease
    there ends.
    """
    num_decode_ranks: int
    """Decode ranks of one reader that turn to this prefill rank."""


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """Return the global indices of the KV heads that a rank holds.

    Raises HandshakeError when the heads cannot be shared out evenly.
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
    *, num_kv_heads: int, prefill_tp_size: int, decode_tp_size: int, decode_tp_rank: int
) -> tuple[SourceRank, ...]:
    """Return the prefill ranks that one decode rank turns to, in ascending order.

    Their heads are disjoint and cover those of the decode rank. Raises HandshakeError when a TP
    size does not fit the number of heads.
    """
    mapping = _HeadMapping(num_kv_heads, prefill_tp_size, decode_tp_size)
    sources = []
    for prefill_rank in range(prefill_tp_size):
        readers = mapping.readers(prefill_rank)
        visitors = readers or [mapping.visitor(prefill_rank)]
        if decode_tp_rank in visitors:
            heads = mapping.shared_heads(prefill_rank, decode_tp_rank) if readers else range(0)
            sources.append(SourceRank(prefill_rank, heads, len(visitors)))
    return tuple(sources)


@dataclass(frozen=True, slots=True)
class _HeadMapping:
    num_kv_heads: int
    prefill_tp_size: int
    decode_tp_size: int

    def readers(self, prefill_rank: int) -> list[int]:
        """Return the decode ranks that read heads of this prefill rank."""
        # Replica r of R of a head serves the decode replicas d of D with d * R // D == r.
        return [
            decode_rank
            for decode_rank in range(self.decode_tp_size)
            if self.shared_heads(prefill_rank, decode_rank)
            and prefill_rank % self._prefill_replicas
            == decode_rank % self._decode_replicas * self._prefill_replicas // self._decode_replicas
        ]

    def visitor(self, prefill_rank: int) -> int:
        """Return the decode rank that ends the lease of a replica which nobody reads."""
        replica = (
            prefill_rank % self._prefill_replicas * self._decode_replicas // self._prefill_replicas
        )
        return next(
            decode_rank
            for decode_rank in range(self.decode_tp_size)
            if self.shared_heads(prefill_rank, decode_rank)
            and decode_rank % self._decode_replicas == replica
        )

    def shared_heads(self, prefill_rank: int, decode_rank: int) -> range:
        held = heads_of_rank(self.num_kv_heads, self.prefill_tp_size, prefill_rank)
        wanted = heads_of_rank(self.num_kv_heads, self.decode_tp_size, decode_rank)
        start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
        return range(start, max(start, stop))

    @property
    def _prefill_replicas(self) -> int:
        return max(1, self.prefill_tp_size // self.num_kv_heads)

    @property
    def _decode_replicas(self) -> int:
        return max(1, self.decode_tp_size // self.num_kv_heads)
