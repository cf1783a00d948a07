"""Lets a connector's library move the same pieces by itself, in the ranks' own processes: no side
channel, no proof.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pdlaunch.bench.transfer.shape import BenchShape
from pdlaunch.errors import TransferError
from pdlaunch.transfer.channel.head_mapping import heads_of_rank, map_sources
from pdlaunch.transfer.connectors.connector import memory_kind
from pdlaunch.transfer.connectors.nixl import load_nixl, new_agent
from pdlaunch.transfer.connectors.piece_copies import HostCopier, PieceCopier, Pieces


@dataclass(frozen=True, slots=True)
class Part:
    """Names the pieces that one decode rank gets from one prefill rank, by their TP ranks."""

    prefill_rank: int
    decode_rank: int
    local: list[int]
    """Offsets of the pieces in bytes from the start of the decode rank's cache."""
    remote: list[int]
    """Offsets of the pieces in bytes from the start of the prefill rank's cache."""
    piece_bytes: int


def parts_of(
    shape: BenchShape, pair: tuple[int, int], local: list[int], remote: list[int], *, by_head: bool
) -> list[Part]:
    """Return the pieces of the blocks.

    That is one a block where both ranks have the same heads, else one a block and head when
    ``by_head``.
    """
    head_bytes, parts = shape.layout().head_bytes, []
    for decode_rank in range(pair[1]):
        sources = map_sources(
            num_kv_heads=shape.num_kv_heads,
            prefill_tp_size=pair[0],
            decode_tp_size=pair[1],
            decode_tp_rank=decode_rank,
        )
        ours = heads_of_rank(shape.num_kv_heads, pair[1], decode_rank)
        for source in sources:
            theirs = heads_of_rank(shape.num_kv_heads, pair[0], source.tp_rank)
            num_heads = 1 if by_head and ours != theirs else len(source.heads)
            starts = source.heads[:: max(1, num_heads)]
            local_places, remote_places = (
                [
                    (block * len(held) + head - held.start) * head_bytes
                    for block in blocks
                    for head in starts
                ]
                for blocks, held in ((local, ours), (remote, theirs))
            )
            parts.append(
                Part(
                    source.tp_rank, decode_rank, local_places, remote_places, num_heads * head_bytes
                )
            )
    return [part for part in parts if part.local]


@dataclass(slots=True)
class _Read:
    handle: Any
    state: str = ""
    posted_at: float = 0.0
    ended_at: float = 0.0


class BareNixl:
    """Moves blocks by another NIXL agent of the same settings; the decode side reads."""

    decode_side_moves = True
    by_head = True

    def __init__(self, name: str, kv_cache: torch.Tensor) -> None:
        self._cache = kv_cache
        self._kind, self._device_index = memory_kind(kv_cache)
        self._agent = new_agent(*load_nixl(), name, self._kind)
        self._registration = self._agent.register_memory(kv_cache)

    def address(self) -> Any:
        """Return what the other side needs."""
        return self._agent.get_agent_metadata(), self._cache.data_ptr(), self._device_index

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from or to all ranks of the other side."""
        self._peers = [
            (self._agent.add_remote_agent(metadata), base, index)
            for metadata, base, index in addresses
        ]

    def move(self, parts: Sequence[Part]) -> float:
        """Return the seconds of the slowest READ from one prefill rank, as in pulls.

        All begin at once, with their descriptors prepared.
        """
        reads = [_Read(self._prepare(part)) for part in parts]
        for read in reads:
            read.posted_at = time.perf_counter()
            read.state = self._agent.transfer(read.handle)
            read.ended_at = time.perf_counter()
            self._look(read)
        while pending := [read for read in reads if read.state == "PROC"]:
            for read in pending:
                self._look(read)
        for read in reads:
            self._agent.release_xfer_handle(read.handle)
        if (states := {read.state for read in reads}) != {"DONE"}:
            raise TransferError(f"bare READs ended as {', '.join(sorted(states))}")
        return max(read.ended_at - read.posted_at for read in reads)

    def _look(self, read: _Read) -> None:
        if read.state == "PROC":
            read.state = self._agent.check_xfer_state(read.handle)
            read.ended_at = time.perf_counter()

    def _prepare(self, part: Part) -> Any:
        name, base, index = self._peers[part.prefill_rank]
        ours = self._descriptors(
            self._cache.data_ptr(), self._device_index, part.local, part.piece_bytes
        )
        theirs = self._descriptors(base, index, part.remote, part.piece_bytes)
        return self._agent.initialize_xfer("READ", ours, theirs, name)

    def _descriptors(self, base: int, device_index: int, places: Sequence[int], size: int) -> Any:
        return self._agent.get_xfer_descs(
            [(base + place, size, device_index) for place in places], self._kind
        )


class BareMooncake:
    """Moves blocks by a transfer engine; the prefill side writes."""

    decode_side_moves = False
    by_head = False

    def __init__(self, name: str, kv_cache: torch.Tensor) -> None:
        from mooncake.engine import TransferEngine

        self._cache = kv_cache
        self._engine = TransferEngine()
        codes = (
            self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""),
            self._engine.register_memory(
                self._cache.data_ptr(), self._cache.numel() * self._cache.element_size()
            ),
        )
        if any(codes):
            raise TransferError(f"{name}: Mooncake cannot start: {codes}")

    def address(self) -> Any:
        """Return what the other side needs."""
        return f"127.0.0.1:{self._engine.get_rpc_port()}", self._cache.data_ptr()

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from or to all ranks of the other side."""
        self._peers = addresses

    def move(self, parts: Sequence[Part]) -> float:
        """Return the seconds that the transfers take, one after another."""
        return sum(self._write(part) for part in parts)

    def _write(self, part: Part) -> float:
        segment, base = self._peers[part.decode_rank]
        ours = [self._cache.data_ptr() + place for place in part.remote]
        theirs = [base + place for place in part.local]
        start_at = time.perf_counter()
        code = self._engine.batch_transfer_sync_write(
            segment, ours, theirs, [part.piece_bytes] * len(ours)
        )
        seconds = time.perf_counter() - start_at
        if code != 0:
            raise TransferError(f"a bare write ended with code {code}")
        return seconds


class BareCopy:
    """Copies blocks as the P2P path does: they lie in the process of the decode rank too, on the
    devices of the prefill ranks.
    """

    decode_side_moves = True
    by_head = False

    def __init__(self, name: str, kv_cache: torch.Tensor) -> None:
        self._cache = kv_cache

    def address(self) -> Any:
        """Return what the other side needs."""
        return tuple(self._cache.shape), self._cache.dtype, self._cache.device

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from the devices of all ranks of the other side."""
        self._sources = [
            torch.empty(shape, dtype=dtype, device=device).normal_()
            for shape, dtype, device in addresses
        ]
        if not self._cache.is_cuda:
            self._copier: PieceCopier = HostCopier()
            return
        from pdlaunch.transfer.connectors.cuda_copies import new_cuda_copiers

        for source in self._sources:
            self._cache.view(-1)[:1].copy_(
                source.view(-1)[:1]
            )  # torch then lets the one device use the other's memory
        torch.cuda.synchronize()
        self._copier = new_cuda_copiers(self._cache)[0]

    def move(self, parts: Sequence[Part]) -> float:
        """Return the seconds of the slowest copy from a prefill rank; as in pulls, all begin at
        once.
        """
        copies = [self._copier.start(self._pieces(part)) for part in parts]
        while "pending" in [copy.poll() for copy in copies]:
            time.sleep(0)
        return max(copy.seconds() for copy in copies)

    def _pieces(self, part: Part) -> Pieces:
        ours, theirs = (
            np.array(places, dtype=np.uint64) + np.uint64(cache.data_ptr())
            for places, cache in (
                (part.local, self._cache),
                (part.remote, self._sources[part.prefill_rank]),
            )
        )
        return Pieces(ours, theirs, part.piece_bytes)


BareKind = type[BareNixl] | type[BareMooncake] | type[BareCopy]
BARE: dict[str, BareKind] = {"nixl": BareNixl, "mooncake": BareMooncake, "p2p": BareCopy}
"""The libraries by connector or path; a file has no library of its own to compare with."""
