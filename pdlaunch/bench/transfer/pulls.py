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

from pdlaunch.bench.transfer.bare import BARE
from pdlaunch.bench.transfer.pairs import LEASE_S, BareTransfers, CachePlace, TPPair, new_pair
from pdlaunch.bench.transfer.rank import PullTimes
from pdlaunch.bench.transfer.shape import BenchShape
from pdlaunch.config.connectors import (
    FileSettings,
    KVPath,
    MooncakeProtocol,
    MooncakeSettings,
    NixlSettings,
)
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import memory_bytes
from pdlaunch.planning.role_engines import DTypeName

NUM_WARM_UP_TURNS = 2
NUM_CACHES = 4
"""Whole KV caches that exist at a time: one for each side, with checksums and without."""
TURN = ("unverified", "pull", "bare", "pull")
"""Order of a round. The things compared run after the same predecessor, so that blocks are equally
cold for both.
"""

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
    place = CachePlace(device, enable_cumem_allocator)
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
    """Raise ConfigError without the device, or without memory for all KV caches.

    Each decode rank has, beside them, blocks of its own for bare copies.
    """
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
    place: CachePlace,
) -> tuple[str, dict[str, Way], BareTransfers | None]:
    """Return the path in use, and all ways to move blocks.

    They are measured in turns, so that other work of the machine slows all of them alike.
    """
    unverified = new_pair(stack, settings.model_copy(update={"verify": False}), pair, shape, place)
    whole = new_pair(stack, settings, pair, shape, place)
    ways: dict[str, Way] = {"unverified": unverified.pull, "pull": whole.pull}
    used = ", ".join(sorted(unverified.paths | whole.paths))
    kind = BARE.get(
        "p2p" if all(path.startswith("p2p/") for path in unverified.paths) else settings.connector
    )
    if kind is None or not (kind.decode_side_moves or settings.mooncake.protocol == "tcp"):
        return used, ways, None
    bare = BareTransfers(kind, unverified, pair, shape)
    return used, {**ways, "bare": bare.move}, bare


def _blocks(shape: BenchShape, count: int) -> tuple[list[int], list[int]]:
    """Return scattered local and remote block ids; the same in every run."""
    source = random.Random(count)
    return source.sample(range(shape.num_blocks), count), source.sample(
        range(shape.num_blocks), count
    )


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
