"""Time pulls of KV blocks by connector, TP pair and number of blocks (``pdlaunch bench transfer``).

Every figure is moved bytes over the median time for scattered blocks: of a bare loop of the connector's library, of the READs of
pulls, of whole pulls (side channel, lease, READ) without checksums, and of whole pulls as they are by default.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from pdlaunch.config.connector_environment import connector_environment
from pdlaunch.config.models import ConnectorName, KVPath, KVTransferSettings, MooncakeProtocol, Role
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.platform.limits import memory_bytes
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.protocol.transfer import GrantLease, StartPull
from pdlaunch.transfer.bench_bare import BARE, BareKind, parts_of, run_bare
from pdlaunch.transfer.bench_rank import BenchShape, DType, Process, PullTimes, RankOptions, run_rank
from pdlaunch.transfer.engine_id import draw_engine_id
from pdlaunch.transfer.mapping import map_sources

NUM_WARM_UPS = 2
LEASE_S = 600.0
NUM_CACHES = 6
"""KV caches of all heads that there are at a time: holder and puller, with checksums, without, and of the bare loop."""

TPPair = tuple[int, int]
"""TP sizes of the holder and of the puller."""
Way = Callable[[list[int], list[int]], PullTimes]
"""Moves blocks once, from local and remote block ids."""


@dataclass(frozen=True, slots=True)
class TransferTiming:
    """Gigabytes a second of one kind of pull."""

    connector: str
    path: str
    """That the handshake has chosen."""
    tp_pair: str
    num_blocks: int
    megabytes: float
    bare_gb_per_s: float | None
    """None: this connector has no library of its own."""
    read_gb_per_s: float
    unverified_gb_per_s: float
    pull_gb_per_s: float
    read_ratio: float | None
    """Of the READ to the bare loop, which moves the same pieces."""
    pull_ratio: float | None
    """Of the pull without checksums to the bare loop."""
    overhead_us: int
    """What the pull without checksums takes beyond its READ."""
    checksum_percent: float
    """What checksums add to the time of the pull without them."""


def bench_transfer(
    *,
    connectors: Sequence[ConnectorName] = ("nixl",),
    paths: Sequence[KVPath] = ("auto",),
    tp_pairs: Sequence[TPPair] = ((1, 1),),
    num_blocks: Sequence[int] = (16, 128),
    num_repeats: int = 10,
    num_layers: int = 30,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: DType = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    enable_cumem_allocator: bool = False,
    mooncake_protocol: MooncakeProtocol = "tcp",
) -> list[TransferTiming]:
    """The default shape is that of the demo model; ``paths`` are those of connector nixl.

    Raises TransferError, and ConfigError without a device or the memory.
    """
    shape = BenchShape(max(num_blocks), num_layers, num_kv_heads, head_dim, block_size, dtype)
    _check(shape, device)
    place = _Place(device, enable_cumem_allocator and device == "cuda")
    kinds = [(connector, path) for connector in connectors for path in (paths if connector == "nixl" else ("auto",))]
    rows = []
    for connector, path in kinds:
        for pair in tp_pairs:
            with _settings(connector, path, mooncake_protocol) as settings, contextlib.ExitStack() as stack:
                used, ways = _ways(stack, settings, pair, shape, place)
                for count in num_blocks:
                    times = _medians(ways, *_blocks(shape, count), num_repeats)
                    rows.append(_row(connector, used, pair, count, count * shape.layout().block_bytes, times))
    return rows


def _check(shape: BenchShape, device: str) -> None:
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device: torch finds no CUDA device here", field="device", value=device, fix="Take --device cpu.")
        return
    needed_bytes, there_bytes = NUM_CACHES * shape.num_blocks * shape.layout().block_bytes, memory_bytes()
    if needed_bytes > there_bytes:
        message = f"num_blocks: {shape.num_blocks} need {format_size(needed_bytes)}, this machine has {format_size(there_bytes)}"
        raise ConfigError(message, field="num_blocks", value=shape.num_blocks, fix="Take smaller --num-blocks.")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where KV caches lie."""

    device: str
    with_cumem: bool


def _row(
    connector: str, path: str, pair: TPPair, num_blocks: int, num_bytes: int, times: Mapping[str, PullTimes]
) -> TransferTiming:
    bare_s = times["bare"].read_s if "bare" in times else None
    read_s, unverified_s, pull_s = times["unverified"].read_s, times["unverified"].pull_s, times["pull"].pull_s
    return TransferTiming(
        connector=connector,
        path=path,
        tp_pair=f"{pair[0]}x{pair[1]}",
        num_blocks=num_blocks,
        megabytes=round(num_bytes / 1e6, 2),
        bare_gb_per_s=None if bare_s is None else round(num_bytes / 1e9 / bare_s, 3),
        read_gb_per_s=round(num_bytes / 1e9 / read_s, 3),
        unverified_gb_per_s=round(num_bytes / 1e9 / unverified_s, 3),
        pull_gb_per_s=round(num_bytes / 1e9 / pull_s, 3),
        read_ratio=None if bare_s is None else round(bare_s / read_s, 3),
        pull_ratio=None if bare_s is None else round(bare_s / unverified_s, 3),
        overhead_us=round((unverified_s - read_s) * 1e6),
        checksum_percent=round((pull_s / unverified_s - 1) * 100, 1),
    )


@contextlib.contextmanager
def _settings(connector: ConnectorName, path: KVPath, mooncake_protocol: MooncakeProtocol) -> Iterator[KVTransferSettings]:
    with tempfile.TemporaryDirectory(prefix="pdlaunch-bench-") as folder:
        yield KVTransferSettings(
            connector=connector,
            path=path,
            mooncake_protocol=mooncake_protocol,
            file_directory=folder if connector == "file" else None,
            lease_s=LEASE_S,
        )


def _ways(
    stack: contextlib.ExitStack, settings: KVTransferSettings, pair: TPPair, shape: BenchShape, place: _Place
) -> tuple[str, dict[str, Way]]:
    """The path in use, and all kinds at once, to be measured in turns: what else the machine does then hits all alike."""
    unverified = _new_pair(stack, settings.model_copy(update={"verify": False}), pair, shape, place)
    whole = _new_pair(stack, settings, pair, shape, place)
    ways: dict[str, Way] = {"unverified": unverified.pull, "pull": whole.pull}
    bare = BARE.get("p2p" if all(path.startswith("p2p/") for path in unverified.paths) else settings.connector)
    if bare is not None and (bare.reader_moves or settings.mooncake_protocol == "tcp"):
        ways["bare"] = _new_bare(stack, bare, settings, pair, shape, place.device)
    return ", ".join(sorted(unverified.paths | whole.paths)), ways


def _new_bare(
    stack: contextlib.ExitStack, kind: BareKind, settings: KVTransferSettings, pair: TPPair, shape: BenchShape, device: str
) -> Way:
    """Its processes are stopped between two turns: NIXL's own settings let a thread of each spin."""
    environment = connector_environment(settings)
    sides = [
        [
            Process(run_bare, kind, f"{side}{rank}", shape, _device(device, first + rank), tp_size, environment)
            for rank in range(tp_size)
        ]
        for side, first, tp_size in (("holder", 0, pair[0]), ("reader", pair[0], pair[1]))
    ]
    processes = [process for side in sides for process in side]
    for process in processes:
        stack.callback(process.stop)
    movers, others = reversed(sides) if kind.reader_moves else sides
    addresses = [process.call("address") for process in others]
    for mover in movers:
        mover.call("connect", addresses)
    for process in processes:
        process.pause()

    def move(local: list[int], remote: list[int]) -> PullTimes:
        parts = parts_of(shape, pair, local, remote, by_head=kind.by_head)
        for process in processes:
            process.resume()
        for rank, mover in enumerate(movers):
            mover.send("move", [part for part in parts if rank == (part.reader if kind.reader_moves else part.holder)])
        seconds: list[float] = [mover.wait() for mover in movers]
        for process in processes:
            process.pause()
        return PullTimes(max(seconds), max(seconds))

    return move


def _new_pair(stack: contextlib.ExitStack, settings: KVTransferSettings, pair: TPPair, shape: BenchShape, place: _Place) -> _Pair:
    keys, engine_ids = new_launch_keys(), (draw_engine_id(), draw_engine_id())
    sides: list[list[Process]] = []
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role, tp_size, engine_id in zip(roles, pair, engine_ids, strict=True):
        first = pair[0] if sides else 0
        options = [
            RankOptions(
                role, rank, tp_size, _device(place.device, first + rank), shape, settings, engine_id, keys, place.with_cumem
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

    def __init__(self, holders: Sequence[Process], pullers: Sequence[Process], engine_id: str) -> None:
        """``engine_id``: of the holder."""
        self._holders, self._pullers = holders, pullers
        self._engine_id, self._tp_size = engine_id, len(holders)
        self._num_pulls = 0
        self.paths: set[str] = set()
        """In use, once connected."""

    def connect(self, num_kv_heads: int) -> None:
        """Every puller shakes hands with every holder."""
        map_sources(
            num_kv_heads=num_kv_heads, holder_tp_size=self._tp_size, puller_tp_size=len(self._pullers), puller_tp_rank=0
        )  # refuses what does not fit, before anybody waits for it
        processes = (*self._holders, *self._pullers)
        for process in processes:
            process.send("entry")
        entries = [process.wait() for process in processes]
        for puller in self._pullers:
            puller.send("connect", entries, len(self._holders))
        for puller in self._pullers:
            self.paths |= puller.wait()

    def pull(self, local: list[int], remote: list[int]) -> PullTimes:
        """One lease's pull by all ranks; the slowest counts."""
        self._num_pulls += 1
        name = f"pull-{self._num_pulls}"
        hashes = [index.to_bytes(32) for index in range(len(local))]
        grant = GrantLease(
            request_id=name,
            block_ids=[remote],
            first_block_index=[0],
            block_hashes=hashes,
            num_tokens=len(local),
            num_readers=1,
            first_tokens=[],
            lease_s=LEASE_S,
        )
        for holder in self._holders:
            holder.call("grant", grant)
        remote_kv = RemoteKV(
            engine_id=self._engine_id,
            request_id=name,
            host="",
            port=0,
            block_ids=[],
            num_tokens=len(local),
            tp_size=self._tp_size,
        )
        command = StartPull(
            pull_id=name,
            request_id=name,
            remote=remote_kv,
            block_ids=[local],
            first_block_index=[0],
            block_hashes=hashes,
            num_tokens=len(local),
            timeout_s=LEASE_S,
        )
        for puller in self._pullers:
            puller.send("pull", command)
        times: list[PullTimes] = [puller.wait() for puller in self._pullers]
        for holder in self._holders:
            holder.call("ended")
        return PullTimes(max(time.pull_s for time in times), max(time.read_s for time in times))


def _blocks(shape: BenchShape, count: int) -> tuple[list[int], list[int]]:
    """Scattered block ids, here and there; the same in every run."""
    source = random.Random(count)
    return source.sample(range(shape.num_blocks), count), source.sample(range(shape.num_blocks), count)


def _device(device: str, index: int) -> str:
    return device if device == "cpu" else f"cuda:{index % torch.cuda.device_count()}"


def _medians(ways: Mapping[str, Way], local: list[int], remote: list[int], num_repeats: int) -> dict[str, PullTimes]:
    times: dict[str, list[PullTimes]] = {name: [] for name in ways}
    for _ in range(NUM_WARM_UPS + num_repeats):
        for name, way in ways.items():
            times[name].append(way(local, remote))
    return {name: _median(found[NUM_WARM_UPS:]) for name, found in times.items()}


def _median(times: Sequence[PullTimes]) -> PullTimes:
    return PullTimes(statistics.median(time.pull_s for time in times), statistics.median(time.read_s for time in times))


def main() -> None:
    """``python -m pdlaunch.transfer.bench_transfer '{"num_blocks": [16]}'``: arguments as JSON, rows as JSON on stdout."""
    import json
    import sys

    arguments = json.loads(sys.argv[1])
    if "tp_pairs" in arguments:
        arguments["tp_pairs"] = [tuple(pair) for pair in arguments["tp_pairs"]]
    try:
        rows = bench_transfer(**arguments)
    except PdlaunchError as error:
        fix = f"\nfix: {error.fix}" if isinstance(error, ConfigError) and error.fix else ""
        sys.exit(f"error: {error}{fix}")
    sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")


if __name__ == "__main__":
    main()
