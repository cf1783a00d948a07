"""What a connector's library does by itself over the same pieces: a loop in a process a rank, no side channel, no proof."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.bench_rank import BenchShape
from pdlaunch.transfer.mapping import heads_of_rank, map_sources
from pdlaunch.transfer.piece_copies import HostCopier, PieceCopier, Pieces


@dataclass(frozen=True, slots=True)
class Part:
    """What one reader gets from one holder; both are TP ranks."""

    holder: int
    reader: int
    local: list[int]
    """Where the pieces go, in bytes from the start of the reader's cache."""
    remote: list[int]
    """Where they lie, in bytes from the start of the holder's cache."""
    piece_bytes: int


def parts_of(shape: BenchShape, pair: tuple[int, int], local: list[int], remote: list[int], *, by_head: bool) -> list[Part]:
    """Pieces of the blocks: one a block where both ranks have the same heads, else one a block and head when ``by_head``."""
    head_bytes, parts = shape.layout().head_bytes, []
    for reader in range(pair[1]):
        sources = map_sources(
            num_kv_heads=shape.num_kv_heads, holder_tp_size=pair[0], puller_tp_size=pair[1], puller_tp_rank=reader
        )
        ours = heads_of_rank(shape.num_kv_heads, pair[1], reader)
        for source in sources:
            theirs = heads_of_rank(shape.num_kv_heads, pair[0], source.tp_rank)
            num_heads = 1 if by_head and ours != theirs else len(source.heads)
            starts = source.heads[:: max(1, num_heads)]
            local_places, remote_places = (
                [(block * len(held) + head - held.start) * head_bytes for block in blocks for head in starts]
                for blocks, held in ((local, ours), (remote, theirs))
            )
            parts.append(Part(source.tp_rank, reader, local_places, remote_places, num_heads * head_bytes))
    return [part for part in parts if part.local]


class BareNixl:
    """An agent with NIXL's own settings; the reader reads."""

    reader_moves = True
    by_head = True

    def __init__(self, name: str, shape: BenchShape, device: str, tp_size: int) -> None:
        from nixl import _api

        self._cache = shape.new_cache(device, tp_size)
        self._agent = _api.nixl_agent(name, _api.nixl_agent_config(backends=["UCX"]))
        self._registration = self._agent.register_memory(self._cache)
        self._device_index = max(0, self._cache.get_device())
        self._kind = "DRAM" if device == "cpu" else "VRAM"

    def address(self) -> Any:
        """What the other side needs."""
        return self._agent.get_agent_metadata(), self._cache.data_ptr(), self._device_index

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from or to all ranks of the other side."""
        self._peers = [(self._agent.add_remote_agent(metadata), base, index) for metadata, base, index in addresses]

    def move(self, parts: Sequence[Part]) -> float:
        """Seconds that the transfers take, their descriptors being prepared."""
        handles = [self._prepare(part) for part in parts]
        started_s = time.perf_counter()
        states = [self._agent.transfer(handle) for handle in handles]
        while "PROC" in states:
            states = [self._agent.check_xfer_state(handle) for handle in handles]
        seconds = time.perf_counter() - started_s
        for handle in handles:
            self._agent.release_xfer_handle(handle)
        if set(states) != {"DONE"}:
            raise TransferError(f"bare READs ended as {states}")
        return seconds

    def _prepare(self, part: Part) -> Any:
        name, base, index = self._peers[part.holder]
        ours = self._descriptors(self._cache.data_ptr(), self._device_index, part.local, part.piece_bytes)
        theirs = self._descriptors(base, index, part.remote, part.piece_bytes)
        return self._agent.initialize_xfer("READ", ours, theirs, name)

    def _descriptors(self, base: int, device_index: int, places: Sequence[int], size: int) -> Any:
        return self._agent.get_xfer_descs([(base + place, size, device_index) for place in places], self._kind)


class BareMooncake:
    """A transfer engine; the holder writes."""

    reader_moves = False
    by_head = False

    def __init__(self, name: str, shape: BenchShape, device: str, tp_size: int) -> None:
        from mooncake.engine import TransferEngine

        self._cache = shape.new_cache(device, tp_size)
        self._engine = TransferEngine()
        codes = (
            self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""),
            self._engine.register_memory(self._cache.data_ptr(), self._cache.numel() * self._cache.element_size()),
        )
        if any(codes):
            raise TransferError(f"{name}: Mooncake cannot start: {codes}")

    def address(self) -> Any:
        """What the other side needs."""
        return f"127.0.0.1:{self._engine.get_rpc_port()}", self._cache.data_ptr()

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from or to all ranks of the other side."""
        self._peers = addresses

    def move(self, parts: Sequence[Part]) -> float:
        """Seconds that the transfers take, one after another."""
        return sum(self._write(part) for part in parts)

    def _write(self, part: Part) -> float:
        segment, base = self._peers[part.reader]
        ours = [self._cache.data_ptr() + place for place in part.remote]
        theirs = [base + place for place in part.local]
        started_s = time.perf_counter()
        code = self._engine.batch_transfer_sync_write(segment, ours, theirs, [part.piece_bytes] * len(ours))
        seconds = time.perf_counter() - started_s
        if code != 0:
            raise TransferError(f"a bare write ended with code {code}")
        return seconds


class BareCopy:
    """Both caches in the reader's process, copied as the P2P path does: what is left is the side channel."""

    reader_moves = True
    by_head = False

    def __init__(self, name: str, shape: BenchShape, device: str, tp_size: int) -> None:
        self._shape, self._device, self._tp_size = shape, device, tp_size

    def address(self) -> Any:
        """What the other side needs."""
        return self._device, self._tp_size

    def connect(self, addresses: Sequence[Any]) -> None:
        """Get ready to move blocks from the devices of all ranks of the other side."""
        self._cache = self._shape.new_cache(self._device, self._tp_size)
        self._sources = [self._shape.new_cache(device, tp_size) for device, tp_size in addresses]
        if self._device == "cpu":
            self._copier: PieceCopier = HostCopier()
            return
        from pdlaunch.transfer.cuda_copies import new_cuda_copiers

        for source in self._sources:
            self._cache.view(-1)[:1].copy_(source.view(-1)[:1])  # torch then lets the one device use the other's memory
        torch.cuda.synchronize()
        torch.cuda.set_device(torch.device(self._device))
        self._copier = new_cuda_copiers(self._cache)[0]

    def move(self, parts: Sequence[Part]) -> float:
        """Seconds of the copies, one after another."""
        return sum(self._copy(part) for part in parts)

    def _copy(self, part: Part) -> float:
        ours, theirs = (
            np.array(places, dtype=np.uint64) + np.uint64(cache.data_ptr())
            for places, cache in ((part.local, self._cache), (part.remote, self._sources[part.holder]))
        )
        copy = self._copier.start(Pieces(ours, theirs, part.piece_bytes))
        while copy.state() == "pending":
            time.sleep(0)
        return copy.seconds()


BareKind = type[BareNixl] | type[BareMooncake] | type[BareCopy]
BARE: dict[str, BareKind] = {"nixl": BareNixl, "mooncake": BareMooncake, "p2p": BareCopy}
"""By connector or path; a file has no library of its own to compare with."""


def run_bare(
    pipe: Connection,
    kind: BareKind,
    name: str,
    shape: BenchShape,
    device: str,
    tp_size: int,
    environment: dict[str, str],
) -> None:
    """Main function of the process; answers calls of the methods above until it is killed."""
    torch.set_num_threads(1)
    os.environ.update({**environment, **os.environ})
    try:
        bare = kind(name, shape, device, tp_size)
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(bare, method)(*arguments))
    except EOFError:
        os._exit(0)
    except Exception as error:  # Whatever it is, the parent raises it.
        pipe.send(TransferError(f"{name}: {error}"))
        os._exit(1)
