"""What a connector's library does by itself over the same blocks: a loop in a process, no side channel, no proof."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.bench_rank import BenchShape
from pdlaunch.transfer.piece_copies import HostCopier, PieceCopier, Pieces


class BareNixl:
    """An agent with NIXL's own settings; the reader reads."""

    reader_moves = True

    def __init__(self, name: str, shape: BenchShape, device: str) -> None:
        from nixl import _api

        self._cache = shape.new_cache(device)
        self._block_bytes = shape.layout().block_bytes
        self._agent = _api.nixl_agent(name, _api.nixl_agent_config(backends=["UCX"]))
        self._registration = self._agent.register_memory(self._cache)
        self._device_index = max(0, self._cache.get_device())
        self._kind = "DRAM" if device == "cpu" else "VRAM"

    def address(self) -> Any:
        """What the other side needs."""
        return self._agent.get_agent_metadata(), self._cache.data_ptr(), self._device_index

    def connect(self, address: Any) -> None:
        """Get ready to move blocks from or to the other side."""
        metadata, self._peer_base, self._peer_index = address
        self._peer = self._agent.add_remote_agent(metadata)

    def move(self, local: Sequence[int], remote: Sequence[int]) -> float:
        """Seconds that one transfer takes, its descriptors being prepared."""
        ours = self._descriptors(self._cache.data_ptr(), self._device_index, local)
        theirs = self._descriptors(self._peer_base, self._peer_index, remote)
        handle = self._agent.initialize_xfer("READ", ours, theirs, self._peer)
        started_s = time.perf_counter()
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - started_s
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransferError(f"a bare READ ended as {state}")
        return seconds

    def _descriptors(self, base: int, device_index: int, blocks: Sequence[int]) -> Any:
        size = self._block_bytes
        return self._agent.get_xfer_descs([(base + block * size, size, device_index) for block in blocks], self._kind)


class BareMooncake:
    """A transfer engine; the holder writes."""

    reader_moves = False

    def __init__(self, name: str, shape: BenchShape, device: str) -> None:
        from mooncake.engine import TransferEngine

        self._cache = shape.new_cache(device)
        self._block_bytes = shape.layout().block_bytes
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

    def connect(self, address: Any) -> None:
        """Get ready to move blocks from or to the other side."""
        self._segment, self._peer_base = address

    def move(self, local: Sequence[int], remote: Sequence[int]) -> float:
        """Seconds that one transfer takes."""
        size = self._block_bytes
        ours = [self._cache.data_ptr() + block * size for block in local]
        theirs = [self._peer_base + block * size for block in remote]
        started_s = time.perf_counter()
        code = self._engine.batch_transfer_sync_write(self._segment, ours, theirs, [size] * len(ours))
        seconds = time.perf_counter() - started_s
        if code != 0:
            raise TransferError(f"a bare write ended with code {code}")
        return seconds


class BareCopy:
    """Both caches in the reader's process, copied as the P2P path does: what is left is the side channel."""

    reader_moves = True

    def __init__(self, name: str, shape: BenchShape, device: str) -> None:
        self._shape, self._device = shape, device

    def address(self) -> Any:
        """What the other side needs."""
        return self._device

    def connect(self, address: Any) -> None:
        """Get ready to move blocks from the device of the other side."""
        self._cache, self._source = self._shape.new_cache(self._device), self._shape.new_cache(address)
        if self._device == "cpu":
            self._copier: PieceCopier = HostCopier()
            return
        from pdlaunch.transfer.cuda_copies import new_cuda_copiers

        self._cache[0].copy_(self._source[0])  # torch then lets the one device use the other's memory
        torch.cuda.synchronize()
        torch.cuda.set_device(torch.device(self._device))
        self._copier = new_cuda_copiers(self._cache)[0]

    def move(self, local: Sequence[int], remote: Sequence[int]) -> float:
        """Seconds of one copy."""
        size = self._shape.layout().block_bytes
        ours, theirs = (
            np.array(blocks, dtype=np.uint64) * np.uint64(size) + np.uint64(cache.data_ptr())
            for blocks, cache in ((local, self._cache), (remote, self._source))
        )
        copy = self._copier.start(Pieces(ours, theirs, size))
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
    environment: dict[str, str],
) -> None:
    """Main function of the process; answers calls of the methods above until it is killed."""
    torch.set_num_threads(1)
    os.environ.update({**environment, **os.environ})
    try:
        bare = kind(name, shape, device)
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(bare, method)(*arguments))
    except EOFError:
        os._exit(0)
    except Exception as error:  # Whatever it is, the parent raises it.
        pipe.send(TransferError(f"{name}: {error}"))
        os._exit(1)
