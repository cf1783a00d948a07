"""Describes a rank to its peers, checks that two ranks are compatible before one reads the other's
blocks, and maps the ranks of a decode engine to the prefill ranks that hold their KV heads.

::

    6 heads, prefill TP 2:  | 0 1 2 | 3 4 5 |
              decode TP 3:  | 0 1 | 2 3 | 4 5 |     rank 1 pulls head 2 from rank 0, head 3 from 1

If the TP size exceeds the number of KV heads, ``tp_size / num_kv_heads`` neighbouring ranks hold
replicas of each head, and the decode ranks that need this head are spread over the replicas. If no
decode rank reads a replica, one decode rank begins and ends a pull there, to end the lease.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import torch

from pdlaunch import __version__
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import Role
from pdlaunch.engine.kvcache.groups import KVCacheGroup, KVCacheLayout
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.errors import HandshakeError
from pdlaunch.protocol import side_channel
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import PullDrained, PullFinished
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory, memory_kind
from pdlaunch.transfer.connectors.scratch import DEVICE_SCRATCH_BYTES, SCRATCH_BYTES
from pdlaunch.transfer.integrity.checksum import ALGORITHM, KVHasher
from pdlaunch.transfer.regions import KVRegions, native_regions
from pdlaunch.transfer.side_channel import DecodeSocket

LAYOUT = "block, head, layer, kv, token, dim"


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """Identifies one incarnation of a rank."""

    name: str  # ``decode-0/rank-0``
    engine: str
    engine_id: EngineId
    incarnation: int
    tp_rank: int
    tp_size: int


def draw_engine_id() -> EngineId:
    """Return a random id, 32 hex digits. Rank 0 broadcasts its id to the other ranks."""
    return EngineId(secrets.token_hex(16))


def compatibility_of(
    spec: EngineSpec,
    layout: KVCacheLayout,
    kv_dtype: torch.dtype,
    *,
    model_digest: str,
    total_kv_heads: int,
    connector: str,
) -> side_channel.Compatibility:
    """Return the values that must be equal at both ranks of a pair."""
    return side_channel.Compatibility(
        protocol_version=side_channel.PROTOCOL_VERSION,
        pdlaunch_version=__version__,
        model_digest=model_digest,
        dtype=spec.dtype,
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        block_size=layout.block_size,
        groups=describe_groups(layout.groups),
        num_kv_heads=total_kv_heads,
        head_dim=layout.head_dim,
        layout=LAYOUT,
        connector=connector,
        checksum=ALGORITHM if spec.kv_transfer.verify else "off",
    )


def geometry_of(memory: LocalMemory, first_kv_head: int) -> side_channel.Geometry:
    """Return the addresses and sizes of this rank's KV cache and scratch."""
    kind, device_index = memory_kind(memory.scratch)
    return side_channel.Geometry(
        regions=memory.kv.places,
        num_blocks=memory.kv.num_blocks,
        num_kv_heads=memory.kv.num_heads,
        first_kv_head=first_kv_head,
        device_index=device_index,
        scratch_address=memory.scratch.data_ptr(),
        scratch_bytes=memory.scratch.numel(),
        memory_kind=kind,
    )


def describe_groups(groups: Sequence[KVCacheGroup]) -> str:
    """Return the window and the layers of each group: ``full: 0-5; 512: 6,8,10``."""
    described = []
    for group in groups:
        layers = list(group.layers)
        first, last = layers[0], layers[-1]
        is_run = len(layers) > 1 and layers == list(range(first, last + 1))
        listed = f"{first}-{last}" if is_run else ",".join(map(str, layers))
        described.append(f"{group.sliding_window or 'full'}: {listed}")
    return "; ".join(described)


def compare(
    ours: side_channel.Compatibility, theirs: side_channel.Compatibility, *, local: str, peer: str
) -> None:
    """Raise a HandshakeError that lists each differing field with both values, if there are any."""
    differences = [
        f"{field}: {local} has {getattr(ours, field)!r}, {peer} has {getattr(theirs, field)!r}"
        for field in (info.name for info in msgspec.structs.fields(side_channel.Compatibility))
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if differences:
        raise HandshakeError(
            f"{local} and {peer} cannot exchange KV blocks; " + "; ".join(differences)
        )


@dataclass(frozen=True, slots=True)
class SourceRank:
    """Describes what a decode rank pulls from one prefill rank."""

    tp_rank: int  # TP rank within the prefill engine
    # Global indices of the KV heads to pull. Empty: begin and end a pull, to end the lease there.
    heads: range
    num_decode_ranks: int  # ranks of one decode engine that pull from this prefill rank


def heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """Return which of the model's KV heads a rank holds. Raises HandshakeError."""
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
    """Return the prefill ranks that one decode rank pulls from, in ascending order. Their ``heads``
    are disjoint and cover the heads of the decode rank. Raises HandshakeError.
    """
    prefill_replicas = max(1, prefill_tp_size // num_kv_heads)
    decode_replicas = max(1, decode_tp_size // num_kv_heads)

    def shared_heads(prefill_rank: int, decode_rank: int) -> range:
        held = heads_of_rank(num_kv_heads, prefill_tp_size, prefill_rank)
        wanted = heads_of_rank(num_kv_heads, decode_tp_size, decode_rank)
        start = max(held.start, wanted.start)
        return range(start, max(start, min(held.stop, wanted.stop)))

    sources = []
    for prefill_rank in range(prefill_tp_size):
        replica = prefill_rank % prefill_replicas
        sharing = [rank for rank in range(decode_tp_size) if shared_heads(prefill_rank, rank)]
        # Of R prefill replicas of a head, replica r serves the decode replicas d of D with
        # d * R // D == r.
        readers = [
            rank
            for rank in sharing
            if rank % decode_replicas * prefill_replicas // decode_replicas == replica
        ]
        visiting = replica * decode_replicas // prefill_replicas
        visitors = readers or [next(rank for rank in sharing if rank % decode_replicas == visiting)]
        if decode_tp_rank in visitors:
            heads = shared_heads(prefill_rank, decode_tp_rank) if readers else range(0)
            sources.append(SourceRank(prefill_rank, heads, len(visitors)))
    return tuple(sources)


def is_source(
    num_kv_heads: int, *, prefill: RankIdentity | Entry, decode: RankIdentity | Entry
) -> bool:
    """Return True if a decode rank pulls from a prefill rank; also if their TP sizes do not fit,
    which a handshake reports.
    """
    try:
        sources = map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=prefill.tp_size,
            decode_tp_size=decode.tp_size,
            decode_tp_rank=decode.tp_rank,
        )
    except HandshakeError:
        return True
    return any(source.tp_rank == prefill.tp_rank for source in sources)


@dataclass(frozen=True, slots=True)
class TransferSetup:
    """Holds the settings, memory and callbacks for the transfers of one rank."""

    identity: RankIdentity
    role: Role
    settings: KVTransferSettings
    compatibility: side_channel.Compatibility
    kv: KVRegions  # must outlive the last READ of the process
    kv_memory: KVMemory  # allocates the KV cache and the scratch
    first_kv_head: int
    connector: Connector
    context: SecureContext
    # The transfer thread calls this when it has events for the step loop, and when it dies.
    wake: Callable[[], None]
    # Sends reports about this rank's pairs to the supervisor.
    report: Callable[[ToSupervisor], None]
    clock: Callable[[], float] = time.monotonic
    host: str = "127.0.0.1"  # address that the side channel listens on


def native_setup(
    spec: EngineSpec,
    identity: RankIdentity,
    kv_cache: torch.Tensor,
    layout: KVCacheLayout,
    *,
    connector: Connector,
    model_digest: str,
    total_kv_heads: int,
    **more: Any,
) -> TransferSetup:
    """Return the set-up of a native engine's rank; ``kv_cache``: see ``native_regions``."""
    return TransferSetup(
        identity=identity,
        role=spec.role,
        settings=spec.kv_transfer,
        compatibility=compatibility_of(
            spec,
            layout,
            kv_cache.dtype,
            model_digest=model_digest,
            total_kv_heads=total_kv_heads,
            connector=connector.name,
        ),
        kv=native_regions(kv_cache, layout),
        connector=connector,
        **more,
    )


@dataclass(frozen=True, slots=True)
class DecodeSetup:
    identity: RankIdentity  # this rank
    compatibility: side_channel.Compatibility
    memory: LocalMemory
    first_kv_head: int
    connector: Connector
    hasher: KVHasher | None  # None if ``kv_transfer.verify`` is off
    open_channel: Callable[[str], DecodeSocket]  # connects a side channel to an endpoint
    settings: KVTransferSettings
    clock: Callable[[], float]
    report: Callable[[ToSupervisor], None]
    emit: Callable[[PullFinished | PullDrained], None]

    def sources(self, prefill_tp_size: int) -> tuple[SourceRank, ...]:
        return map_sources(
            num_kv_heads=self.compatibility.num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=self.identity.tp_size,
            decode_tp_rank=self.identity.tp_rank,
        )


def check_geometry(reply: side_channel.HandshakeReply, setup: DecodeSetup) -> None:
    """Raise HandshakeError if the peer's geometry does not fit its TP rank or our head sizes."""
    geometry = reply.geometry
    heads = heads_of_rank(setup.compatibility.num_kv_heads, reply.tp_size, reply.tp_rank)
    expected = {
        "num_kv_heads": {len(heads)},
        "first_kv_head": {heads.start},
        # The sizes on a CPU and on a GPU: connectors such as ``file`` connect CPU and GPU ranks.
        "scratch_bytes": {SCRATCH_BYTES, DEVICE_SCRATCH_BYTES},
    }
    for field, wanted in expected.items():
        if (found := getattr(geometry, field)) not in wanted:
            expectation = " or ".join(map(str, sorted(wanted)))
            raise HandshakeError(
                f"{field}: {reply.rank_name} states {found}, expected {expectation}"
            )
    sizes = [place.head_bytes for place in setup.memory.kv.places]
    if [place.head_bytes for place in geometry.regions] != sizes:
        raise HandshakeError(
            f"head_bytes: {reply.rank_name} states {_counted(geometry.regions)}, expected "
            f"{_counted(setup.memory.kv.places)}"
        )
    for place in geometry.regions:
        if place.stride_bytes < len(heads) * place.head_bytes:
            raise HandshakeError(
                f"stride_bytes: {reply.rank_name} states {place.stride_bytes} for blocks of "
                f"{len(heads) * place.head_bytes} bytes"
            )


def _counted(places: Sequence[side_channel.RegionPlace]) -> str:
    sizes = Counter(place.head_bytes for place in places)
    return ", ".join(f"{size} ({count} regions)" for size, count in sizes.items())
