"""Times pulls of KV blocks by connector, TP pair and size (``pdlaunch bench transfer``).

Every figure is moved bytes over the median time for scattered blocks: of the READs of pulls, of
whole pulls (side channel, lease, READ) without checksums, and of whole pulls as they are by
default. Ranks are processes of their own; pulls with and without checksums take turns, so that
other work of the machine slows both alike.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pdlaunch.bench.transfer.rank import BenchRank, BenchShape, PullTimes, RankOptions
from pdlaunch.config.connectors import (
    FileSettings,
    KVPath,
    MooncakeProtocol,
    MooncakeSettings,
    NixlSettings,
)
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import Role
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import memory_bytes
from pdlaunch.planning.role_engines import DTypeName
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.protocol.transfer import GrantLease, StartPull
from pdlaunch.transfer.handshake import draw_engine_id, map_sources

LEASE_S = 600.0
NUM_WARM_UP_TURNS = 2
NUM_CACHES = 4
"""Whole KV caches that exist at a time: one for each side, with checksums and without."""

TPPair = tuple[int, int]  # TP sizes of the prefill side and of the decode side


@dataclass(frozen=True, slots=True)
class TransferTiming:
    """Holds the speeds of one kind of pull, in gigabytes a second."""

    connector: str
    path: str  # path that the handshake has chosen
    tp_pair: str
    num_blocks: int
    megabytes: float
    read_gb_per_s: float
    unverified_gb_per_s: float
    pull_gb_per_s: float
    overhead_us: int  # time that the pull without checksums takes beyond its READ
    checksum_percent: float  # time that checksums add to the pull without them


def bench_transfer(
    *,
    connectors: Sequence[str] = ("nixl",),
    paths: Sequence[KVPath] = ("auto",),
    tp_pairs: Sequence[TPPair] = ((1, 1),),
    num_blocks: Sequence[int] = (16, 128),
    num_repeats: int = 10,
    num_layers: int = 30,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: DTypeName = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    enable_cumem_allocator: bool = False,
    mooncake_protocol: MooncakeProtocol = "tcp",
) -> list[TransferTiming]:
    """Time pulls of every connector, path, TP pair and number of blocks.

    The default shape is that of the demo model; ``paths`` are those of connector nixl. Raises
    TransferError, and ConfigError without a device or the memory, and for CuMem pools on a CPU.
    """
    shape = BenchShape(max(num_blocks), num_layers, num_kv_heads, head_dim, block_size, dtype)
    _check(shape, device, enable_cumem_allocator)
    kinds = [
        (connector, path)
        for connector in connectors
        for path in (paths if connector == "nixl" else ("auto",))
    ]
    rows = []
    for connector, path in kinds:
        for pair in tp_pairs:
            with (
                tempfile.TemporaryDirectory(prefix="pdlaunch-bench-") as folder,
                contextlib.ExitStack() as stack,
            ):
                settings = KVTransferSettings(
                    connector=connector,
                    nixl=NixlSettings(path=path),
                    mooncake=MooncakeSettings(protocol=mooncake_protocol),
                    file=FileSettings(directory=folder),
                    lease_s=LEASE_S,
                )
                unverified, whole = (
                    RankPair(stack, each, pair, shape, device, enable_cumem_allocator)
                    for each in (settings.model_copy(update={"verify": False}), settings)
                )
                for count in num_blocks:
                    times = _medians(unverified, whole, shape, count, num_repeats)
                    num_bytes = count * shape.layout().block_bytes
                    used = ", ".join(sorted(unverified.paths | whole.paths))
                    rows.append(_row(connector, used, pair, count, num_bytes, *times))
    return rows


def _check(shape: BenchShape, device: str, with_cumem: bool) -> None:
    """Raise ConfigError without the device, or without memory for all KV caches."""
    if with_cumem and device != "cuda":
        raise ConfigError(
            "cumem allocator is not supported on the current platform: KV caches lie on a CPU",
            field="enable_cumem_allocator",
            value=True,
            fix="Take --device cuda, or leave --enable-cumem-allocator out.",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: torch finds no CUDA device here",
            field="device",
            value=device,
            fix="Take --device cpu.",
        )
    needed_bytes = NUM_CACHES * shape.num_blocks * shape.layout().block_bytes
    if device == "cpu" and needed_bytes > memory_bytes():
        raise ConfigError(
            f"num_blocks: {shape.num_blocks} need {format_size(needed_bytes)}, this machine has "
            f"{format_size(memory_bytes())}",
            field="num_blocks",
            value=shape.num_blocks,
            fix="Take smaller --num-blocks.",
        )


def _row(
    connector: str,
    path: str,
    pair: TPPair,
    num_blocks: int,
    num_bytes: int,
    unverified: PullTimes,
    verified: PullTimes,
) -> TransferTiming:
    gigabytes = num_bytes / 1e9
    return TransferTiming(
        connector=connector,
        path=path,
        tp_pair=f"{pair[0]}x{pair[1]}",
        num_blocks=num_blocks,
        megabytes=round(num_bytes / 1e6, 2),
        read_gb_per_s=round(gigabytes / unverified.read_s, 3),
        unverified_gb_per_s=round(gigabytes / unverified.pull_s, 3),
        pull_gb_per_s=round(gigabytes / verified.pull_s, 3),
        overhead_us=round((unverified.pull_s - unverified.read_s) * 1e6),
        checksum_percent=round((verified.pull_s / unverified.pull_s - 1) * 100, 1),
    )


def _medians(
    unverified: RankPair, whole: RankPair, shape: BenchShape, count: int, num_repeats: int
) -> Iterator[PullTimes]:
    """Yield the times without and with checksums; each run moves the same blocks."""
    source = random.Random(count)
    local, remote = (source.sample(range(shape.num_blocks), count) for _ in range(2))
    turns = [
        (unverified.pull(local, remote), whole.pull(local, remote))
        for _ in range(NUM_WARM_UP_TURNS + num_repeats)
    ]
    for times in zip(*turns[NUM_WARM_UP_TURNS:], strict=True):
        yield PullTimes(
            statistics.median(time.pull_s for time in times),
            statistics.median(time.read_s for time in times),
        )


class RankPair:
    """Drives the prefill and the decode ranks of one pair, each in a process of its own."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        settings: KVTransferSettings,
        pair: TPPair,
        shape: BenchShape,
        device: str,
        with_cumem: bool,
    ) -> None:
        """Start the ranks and let every decode rank shake hands with every prefill rank; ``stack``
        stops them.
        """
        # Raises where the TP sizes do not fit, before anybody waits for a handshake.
        map_sources(
            num_kv_heads=shape.num_kv_heads,
            prefill_tp_size=pair[0],
            decode_tp_size=pair[1],
            decode_tp_rank=0,
        )
        keys = new_launch_keys()
        self._engine_id, self._tp_size, self._num_pulls = draw_engine_id(), pair[0], 0

        def start(role: Role, tp_size: int, engine_id: EngineId, first: int) -> list[BenchRank]:
            processes = []
            for rank in range(tp_size):
                place = device
                if device == "cuda":
                    place = f"cuda:{(first + rank) % torch.cuda.device_count()}"
                options = RankOptions(
                    role, rank, tp_size, place, shape, settings, engine_id, keys, with_cumem
                )
                processes.append(BenchRank(options))
                stack.callback(processes[-1].stop)
            return processes

        self._prefill_ranks = start("prefill", pair[0], self._engine_id, 0)
        self._decode_ranks = start("decode", pair[1], draw_engine_id(), pair[0])
        processes = (*self._prefill_ranks, *self._decode_ranks)
        entries = _call_all(processes, "entry")
        self.paths: set[str] = set().union(
            *_call_all(self._decode_ranks, "connect", entries, pair[0])
        )

    def pull(self, local: list[int], remote: list[int]) -> PullTimes:
        """Grant a lease and pull it on all ranks; the slowest counts."""
        self._num_pulls += 1
        name = f"pull-{self._num_pulls}"
        hashes = [index.to_bytes(32) for index in range(len(local))]
        grant = GrantLease(
            lease_id=LeaseId(name),
            block_ids=[remote],
            first_block_index=[0],
            block_hashes=hashes,
            num_tokens=len(local),
            num_readers=1,
            lease_s=LEASE_S,
        )
        _call_all(self._prefill_ranks, "grant", grant)
        remote_kv = RemoteKV(
            engine_id=self._engine_id,
            lease_id=LeaseId(name),
            host="",
            port=0,
            block_ids=[],
            num_tokens=len(local),
            tp_size=self._tp_size,
        )
        command = StartPull(
            pull_id=PullId(name),
            request_id=RequestId(name),
            remote=remote_kv,
            block_ids=[local],
            first_block_index=[0],
            block_hashes=hashes,
            num_tokens=len(local),
            timeout_s=LEASE_S,
        )
        times: list[PullTimes] = _call_all(self._decode_ranks, "pull", command)
        _call_all(self._prefill_ranks, "ended")
        return PullTimes(max(time.pull_s for time in times), max(time.read_s for time in times))


def _call_all(ranks: Sequence[BenchRank], method: str, *arguments: object) -> list[Any]:
    """Call a method of all ranks at the same time; return their answers."""
    return [call.result() for call in [rank.send(method, *arguments) for rank in ranks]]
