"""Runs a process of ``bench transfer``: a rank with a TransferThread and a KV cache of random
numbers, driven through a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import Role
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups, num_kv_heads_of_rank
from pdlaunch.engine.memory.device_kv_memory import open_kv_memory
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.engine.memory.pools import open_memory_pools
from pdlaunch.errors import TransferError
from pdlaunch.planning.role_engines import DTypeName
from pdlaunch.protocol.control import Address, Entry, PairFailed, PairReady, ToSupervisor
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext
from pdlaunch.protocol.transfer import (
    GrantLease,
    LeaseEnded,
    PullFinished,
    StartPull,
    TransferEvent,
)
from pdlaunch.transfer.connectors.opening import new_connector
from pdlaunch.transfer.handshake import RankIdentity
from pdlaunch.transfer.sides import RankMemory, TransferSetup
from pdlaunch.transfer.thread import TransferThread

START_TIMEOUT_S = 120.0
PULL_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class PullTimes:
    """Holds the times of one pull by one rank."""

    pull_s: float  # time from StartPull to PullFinished
    read_s: float  # time of its READ alone, from the post to the end


@dataclass(frozen=True, slots=True)
class BenchShape:
    """Describes the KV cache of one rank with all heads."""

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: DTypeName

    def layout(self, tp_size: int = 1) -> KVCacheLayout:
        """Return the layout of one rank of ``tp_size``."""
        return KVCacheLayout(
            groups=make_groups([None] * self.num_layers),
            num_kv_heads=num_kv_heads_of_rank(self.num_kv_heads, tp_size),
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype_bytes=getattr(torch, self.dtype).itemsize,
        )

    def new_cache(self, memory: KVMemory, tp_size: int = 1) -> torch.Tensor:
        """Return random [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]."""
        layout = self.layout(tp_size)
        pages = memory.zeros(self.num_blocks * layout.block_bytes).view(getattr(torch, self.dtype))
        return pages.view(self.num_blocks, *layout.block_shape()).normal_()


@dataclass(frozen=True, slots=True)
class RankOptions:
    """Sets up one rank."""

    role: Role
    tp_rank: int
    tp_size: int
    device: str  # ``cpu`` or ``cuda:1``
    shape: BenchShape
    kv_transfer: KVTransferSettings
    engine_id: EngineId
    keys: LaunchKeys
    with_cumem: bool  # the KV cache lies in a CuMem pool; only on a GPU

    @property
    def engine(self) -> str:
        return f"{self.role}-0"

    @property
    def name(self) -> str:
        return f"{self.engine}/rank-{self.tp_rank}"


class BenchRank:
    """Runs a ``Rank`` in a child process that answers calls of its methods, one at a time."""

    def __init__(self, options: RankOptions) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, not by every process
        self._pool = ProcessPoolExecutor(1, context)
        self._started = self._pool.submit(_start, options)

    def send(self, method: str, *arguments: object) -> Future[Any]:
        """Begin a call. Raises TransferError when the process has failed."""
        try:
            self._started.result()
            return self._pool.submit(_call, method, *arguments)
        except BrokenProcessPool as error:
            raise TransferError(f"a process of the benchmark ended: {error}") from error

    def stop(self) -> None:
        """End the process, whatever its threads do."""
        with contextlib.suppress(BrokenProcessPool):
            self._pool.submit(os._exit, 0)
        self._pool.shutdown(wait=False)


_ranks: list[Rank] = []  # the one rank of a child process


def _start(options: RankOptions) -> None:
    torch.set_num_threads(1)
    settings = options.kv_transfer
    os.environ.update(
        settings.environment(os.environ, "cpu" if options.device == "cpu" else "cuda")
    )
    try:
        _ranks.append(Rank(options))
    except Exception as error:  # Whatever it is, the parent raises it.
        raise TransferError(f"{options.name}: {error}") from None


def _call(method: str, *arguments: object) -> Any:
    return getattr(_ranks[0], method)(*arguments)


class Rank:
    """Runs in the process: a rank that grants leases, pulls and moves blocks."""

    def __init__(self, options: RankOptions) -> None:
        self._reports: queue.SimpleQueue[ToSupervisor] = queue.SimpleQueue()
        self._woken = threading.Event()
        self._options = options
        shape, layout = options.shape, options.shape.layout(options.tp_size)
        torch.manual_seed(options.tp_rank)
        device = torch.device(options.device)
        pools = open_memory_pools(enabled=options.with_cumem, device=device)
        memory = open_kv_memory(
            pools,
            device,
            shared=options.kv_transfer.maps_memory,
            mapped_alone=options.kv_transfer.only_maps_memory,
        )
        self._kv_cache = shape.new_cache(memory, options.tp_size)
        spec = _spec_of(options)
        setup = TransferSetup(
            spec=spec,
            identity=RankIdentity(
                name=options.name,
                engine=spec.name,
                engine_id=options.engine_id,
                incarnation=1,
                tp_rank=options.tp_rank,
                tp_size=spec.tensor_parallel_size,
            ),
            memory=RankMemory(
                kv_cache=self._kv_cache,
                layout=layout,
                source=memory,
                model_digest="bench",
                total_kv_heads=shape.num_kv_heads,
                first_kv_head=options.tp_rank * layout.num_kv_heads,
            ),
            connector=new_connector(spec.kv_transfer, options.name, 1),
            context=SecureContext(options.keys),
            wake=self._woken.set,
            report=self._reports.put,
        )
        self._transfer = TransferThread(setup)
        self._transfer.wait_started(START_TIMEOUT_S)

    def entry(self) -> Entry:
        """Return this rank's line of the registry."""
        options = self._options
        return Entry(
            name=options.name,
            kind="rank",
            incarnation=1,
            engine=options.engine,
            role=options.role,
            tp_rank=options.tp_rank,
            tp_size=options.tp_size,
            engine_id=options.engine_id,
            address=Address(side_channel=self._transfer.endpoint),
        )

    def connect(self, entries: list[Entry], num_peers: int) -> set[str]:
        """Return when this many peers are ready to be read, over which paths."""
        self._transfer.update_registry(entries)
        paths: list[str] = []
        while len(paths) < num_peers:
            match self._reports.get(timeout=START_TIMEOUT_S):
                case PairReady(path=path):
                    paths.append(path)
                case PairFailed(fatal=True) as failed:
                    raise TransferError(failed.error)
                case _:
                    continue
        return set(paths)

    def grant(self, command: GrantLease) -> None:
        """Grant a lease; return before its checksums are there.

        A pull that is faster waits for them.
        """
        self._transfer.submit([command])

    def pull(self, command: StartPull) -> PullTimes:
        """Run a pull; return what PullFinished says."""
        self._transfer.submit([command])
        while True:
            if not self._woken.wait(PULL_TIMEOUT_S):
                raise TransferError(
                    f"pull {command.pull_id} did not end within {PULL_TIMEOUT_S:g} s"
                )
            self._woken.clear()
            for event in self._transfer.take_events():
                if isinstance(event, PullFinished):
                    return _times(event)

    def ended(self) -> None:
        """Wait for the end of a lease."""
        events: list[TransferEvent] = []
        while not any(isinstance(event, LeaseEnded) for event in events):
            self._woken.wait(PULL_TIMEOUT_S)
            self._woken.clear()
            events = self._transfer.take_events()


def _times(event: PullFinished) -> PullTimes:
    if not event.ok:
        raise TransferError(event.error)
    return PullTimes(event.seconds, event.read_s)


def _spec_of(options: RankOptions) -> EngineSpec:
    shape = options.shape
    return EngineSpec(
        name=options.engine,
        role=options.role,
        model_dir=".",
        served_model_name="bench",
        load_format="dummy",
        dtype=shape.dtype,
        max_model_len=shape.num_blocks * shape.block_size,
        block_size=shape.block_size,
        enable_prefix_caching=False,
        enable_cumem_allocator=False,
        max_num_seqs=1,
        max_num_batched_tokens=shape.block_size,
        device="cpu" if options.device == "cpu" else "cuda",
        device_indices=()
        if options.device == "cpu"
        else (torch.device(options.device).index or 0,),
        tensor_parallel_size=options.tp_size,
        num_threads=1,
        kv_transfer=options.kv_transfer,
    )
