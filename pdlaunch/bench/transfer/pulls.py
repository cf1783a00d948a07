"""Time pulls of KV blocks by connector, TP pair and number of blocks (``pdlaunch bench transfer``).

Every figure is moved bytes over the median time for scattered blocks: of the READs of pulls, of
whole pulls (side channel, lease, READ) without checksums, and of whole pulls as they are by
default. Beside them the connector's library by itself, over the same memory in the same processes:
one transfer in turns with the pulls, and the same transfer over and over. Transfers in turns find
caches alike; pages and caches of other processes, and repeats, make small ones up to a third faster
or slower.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pdlaunch.bench.transfer.bare import BARE, BareKind, Part, parts_of
from pdlaunch.bench.transfer.rank import Process, PullTimes, RankOptions, run_rank
from pdlaunch.bench.transfer.shape import BenchShape
from pdlaunch.config.connectors import (
    FileSettings,
    KVPath,
    MooncakeProtocol,
    MooncakeSettings,
    NixlSettings,
)
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.models import Role
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError
from pdlaunch.platform.limits import memory_bytes
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.protocol.transfer import GrantLease, StartPull
from pdlaunch.resolve.roles import DTypeName
from pdlaunch.transfer.channel.handshake import draw_engine_id
from pdlaunch.transfer.channel.head_mapping import map_sources

NUM_WARM_UP_TURNS = 2
LEASE_S = 600.0
NUM_CACHES = 4
"""KV caches of all heads that there are at a time: of both sides, with checksums and without."""
TURN = ("unverified", "pull", "bare", "pull")
"""Order of a round. What is compared follows the same: blocks are as cold for the one as for the
other.
"""

TPPair = tuple[int, int]
"""TP sizes of the holder and of the puller."""
Way = Callable[[list[int], list[int]], PullTimes]
"""Moves blocks once, from local and remote block ids."""


@dataclass(frozen=True, slots=True)
class TransferTiming:
    """Holds the speeds of one kind of pull, in gigabytes a second."""

    connector: str
    path: str
    """Path that the handshake has chosen."""
    tp_pair: str
    num_blocks: int
    megabytes: float
    bare_gb_per_s: float | None
    """Speed of the library in turns with the READs; None: this connector has no library of its own.
    """
    bare_loop_gb_per_s: float | None
    """Speed of the library over and over."""
    read_gb_per_s: float
    unverified_gb_per_s: float
    pull_gb_per_s: float
    read_ratio: float | None
    """READ over the bare transfer in turns with it, which moves the same pieces."""
    read_loop_ratio: float | None
    """READ over the bare loop."""
    pull_ratio: float | None
    """Pull without checksums over the bare transfer in turns with it."""
    overhead_us: int
    """Time that the pull without checksums takes beyond its READ."""
    checksum_percent: float
    """Time that checksums add to the pull without them."""


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
    _check(shape, device, max(decode_tp_size for _, decode_tp_size in tp_pairs))
    if enable_cumem_allocator and device != "cuda":
        raise ConfigError(
            "cumem allocator is not supported on the current platform: KV caches lie on a CPU",
            field="enable_cumem_allocator",
            value=True,
            fix="Take --device cuda, or leave --enable-cumem-allocator out.",
        )
    place = _Place(device, enable_cumem_allocator)
    kinds = [
        (connector, path)
        for connector in connectors
        for path in (paths if connector == "nixl" else ("auto",))
    ]
    rows = []
    for connector, path in kinds:
        for pair in tp_pairs:
            with (
                _settings(connector, path, mooncake_protocol) as settings,
                contextlib.ExitStack() as stack,
            ):
                used, ways, bare = _ways(stack, settings, pair, shape, place)
                for count in num_blocks:
                    local, remote = _blocks(shape, count)
                    times = _medians(ways, local, remote, num_repeats)
                    if bare is not None:
                        times["bare loop"] = bare.loop(local, remote, num_repeats)
                    rows.append(
                        _row(
                            connector, used, pair, count, count * shape.layout().block_bytes, times
                        )
                    )
    return rows


def _check(shape: BenchShape, device: str, num_decode_ranks: int) -> None:
    """Each puller has blocks for bare copies of its own."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "device: torch finds no CUDA device here",
                field="device",
                value=device,
                fix="Take --device cpu.",
            )
        return
    needed_bytes, there_bytes = (
        (NUM_CACHES + num_decode_ranks) * shape.num_blocks * shape.layout().block_bytes,
        memory_bytes(),
    )
    if needed_bytes > there_bytes:
        message = (
            f"num_blocks: {shape.num_blocks} need {format_size(needed_bytes)}, this machine has "
            f"{format_size(there_bytes)}"
        )
        raise ConfigError(
            message, field="num_blocks", value=shape.num_blocks, fix="Take smaller --num-blocks."
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Says where KV caches lie."""

    device: str
    with_cumem: bool


def _row(
    connector: str,
    path: str,
    pair: TPPair,
    num_blocks: int,
    num_bytes: int,
    times: Mapping[str, PullTimes],
) -> TransferTiming:
    bare_s, loop_s = (
        times[name].read_s if name in times else None for name in ("bare", "bare loop")
    )
    read_s, unverified_s, pull_s = (
        times["unverified"].read_s,
        times["unverified"].pull_s,
        times["pull"].pull_s,
    )
    return TransferTiming(
        connector=connector,
        path=path,
        tp_pair=f"{pair[0]}x{pair[1]}",
        num_blocks=num_blocks,
        megabytes=round(num_bytes / 1e6, 2),
        bare_gb_per_s=None if bare_s is None else round(num_bytes / 1e9 / bare_s, 3),
        bare_loop_gb_per_s=None if loop_s is None else round(num_bytes / 1e9 / loop_s, 3),
        read_gb_per_s=round(num_bytes / 1e9 / read_s, 3),
        unverified_gb_per_s=round(num_bytes / 1e9 / unverified_s, 3),
        pull_gb_per_s=round(num_bytes / 1e9 / pull_s, 3),
        read_ratio=None if bare_s is None else round(bare_s / read_s, 3),
        read_loop_ratio=None if loop_s is None else round(loop_s / read_s, 3),
        pull_ratio=None if bare_s is None else round(bare_s / unverified_s, 3),
        overhead_us=round((unverified_s - read_s) * 1e6),
        checksum_percent=round((pull_s / unverified_s - 1) * 100, 1),
    )


@contextlib.contextmanager
def _settings(
    connector: str, path: KVPath, mooncake_protocol: MooncakeProtocol
) -> Iterator[KVTransferSettings]:
    with tempfile.TemporaryDirectory(prefix="pdlaunch-bench-") as folder:
        yield KVTransferSettings(
            connector=connector,
            nixl=NixlSettings(path=path),
            mooncake=MooncakeSettings(protocol=mooncake_protocol),
            file=FileSettings(directory=folder),
            lease_s=LEASE_S,
        )


def _ways(
    stack: contextlib.ExitStack,
    settings: KVTransferSettings,
    pair: TPPair,
    shape: BenchShape,
    place: _Place,
) -> tuple[str, dict[str, Way], _Bare | None]:
    """Return the path in use, and all ways to move blocks.

    They are measured in turns: what else the machine does then hits all alike.
    """
    unverified = _new_pair(stack, settings.model_copy(update={"verify": False}), pair, shape, place)
    whole = _new_pair(stack, settings, pair, shape, place)
    ways: dict[str, Way] = {"unverified": unverified.pull, "pull": whole.pull}
    used = ", ".join(sorted(unverified.paths | whole.paths))
    kind = BARE.get(
        "p2p" if all(path.startswith("p2p/") for path in unverified.paths) else settings.connector
    )
    if kind is None or not (kind.reader_moves or settings.mooncake.protocol == "tcp"):
        return used, ways, None
    bare = _Bare(kind, unverified, pair, shape)
    return used, {**ways, "bare": bare.move}, bare


def _new_pair(
    stack: contextlib.ExitStack,
    settings: KVTransferSettings,
    pair: TPPair,
    shape: BenchShape,
    place: _Place,
) -> _Pair:
    keys, engine_ids = new_launch_keys(), (draw_engine_id(), draw_engine_id())
    sides: list[list[Process]] = []
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role, tp_size, engine_id in zip(roles, pair, engine_ids, strict=True):
        first = pair[0] if sides else 0
        options = [
            RankOptions(
                role,
                rank,
                tp_size,
                _device(place.device, first + rank),
                shape,
                settings,
                engine_id,
                keys,
                place.with_cumem,
            )
            for rank in range(tp_size)
        ]
        sides.append([Process(run_rank, rank) for rank in options])
        for process in sides[-1]:
            stack.callback(process.stop)
    found = _Pair(sides[0], sides[1], engine_ids[0])
    found.connect(shape.num_kv_heads)
    return found


class _Pair:
    """Holder and puller ranks."""

    def __init__(
        self, holders: Sequence[Process], pullers: Sequence[Process], engine_id: EngineId
    ) -> None:
        """``engine_id``: of the holder."""
        self.holders, self.pullers = holders, pullers
        self._engine_id, self._tp_size = engine_id, len(holders)
        self._num_pulls = 0
        self.paths: set[str] = set()
        """The path in use, once connected."""

    def connect(self, num_kv_heads: int) -> None:
        """Let every reader shake hands with every holder."""
        map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=self._tp_size,
            decode_tp_size=len(self.pullers),
            decode_tp_rank=0,
        )  # refuses what does not fit, before anybody waits for it
        processes = (*self.holders, *self.pullers)
        for process in processes:
            process.send("entry")
        entries = [process.wait() for process in processes]
        for puller in self.pullers:
            puller.send("connect", entries, len(self.holders))
        for puller in self.pullers:
            self.paths |= puller.wait()

    def pull(self, local: list[int], remote: list[int]) -> PullTimes:
        """Run one lease's pull on all ranks; the slowest counts."""
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
            first_tokens=[],
            lease_s=LEASE_S,
        )
        for holder in self.holders:
            holder.call("grant", grant)
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
        for puller in self.pullers:
            puller.send("pull", command)
        times: list[PullTimes] = [puller.wait() for puller in self.pullers]
        for holder in self.holders:
            holder.call("ended")
        return PullTimes(max(time.pull_s for time in times), max(time.read_s for time in times))


class _Bare:
    """The connector's library by itself, in the processes of a pair and over their KV caches."""

    def __init__(self, kind: BareKind, ranks: _Pair, pair: TPPair, shape: BenchShape) -> None:
        self._kind, self._pair, self._shape = kind, pair, shape
        holders, pullers = (
            [rank.call("open_bare", kind) for rank in side]
            for side in (ranks.holders, ranks.pullers)
        )
        self._movers, addresses = (
            (ranks.pullers, holders) if kind.reader_moves else (ranks.holders, pullers)
        )
        for mover in self._movers:
            mover.call("connect_bare", addresses)

    def move(self, local: list[int], remote: list[int]) -> PullTimes:
        """Run one transfer on all ranks at once; the slowest counts."""
        return self._call("move_bare", local, remote)

    def loop(self, local: list[int], remote: list[int], num_repeats: int) -> PullTimes:
        """Run the same transfer over and over; return the median."""
        return self._call("loop_bare", local, remote, num_repeats)

    def _call(
        self, method: str, local: list[int], remote: list[int], *arguments: object
    ) -> PullTimes:
        parts = parts_of(self._shape, self._pair, local, remote, by_head=self._kind.by_head)
        for tp_rank, mover in enumerate(self._movers):
            mover.send(
                method, [part for part in parts if self._mover_of(part) == tp_rank], *arguments
            )
        seconds: float = max([mover.wait() for mover in self._movers])
        return PullTimes(seconds, seconds)

    def _mover_of(self, part: Part) -> int:
        return part.reader if self._kind.reader_moves else part.holder


def _blocks(shape: BenchShape, count: int) -> tuple[list[int], list[int]]:
    """Return scattered local and remote block ids; the same in every run."""
    source = random.Random(count)
    return source.sample(range(shape.num_blocks), count), source.sample(
        range(shape.num_blocks), count
    )


def _device(device: str, index: int) -> str:
    return device if device == "cpu" else f"cuda:{index % torch.cuda.device_count()}"


def _medians(
    ways: Mapping[str, Way], local: list[int], remote: list[int], num_repeats: int
) -> dict[str, PullTimes]:
    times: dict[str, list[PullTimes]] = {name: [] for name in ways}
    turn = TURN if "bare" in ways else tuple(ways)
    for index in range(NUM_WARM_UP_TURNS + num_repeats):
        for name in turn:
            found = ways[name](local, remote)
            if index >= NUM_WARM_UP_TURNS:
                times[name].append(found)
    return {name: _median(found) for name, found in times.items()}


def _median(times: Sequence[PullTimes]) -> PullTimes:
    return PullTimes(
        statistics.median(time.pull_s for time in times),
        statistics.median(time.read_s for time in times),
    )
