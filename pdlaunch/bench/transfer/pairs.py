"""Ranks of ``bench transfer`` in processes of their own: whole pulls between them, and transfers of
the connector's library by itself over the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdlaunch.bench.transfer.bare import BareKind, Part, parts_of
from pdlaunch.bench.transfer.rank import Process, PullTimes, RankOptions, run_rank
from pdlaunch.bench.transfer.shape import BenchShape
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import Role
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import new_launch_keys
from pdlaunch.protocol.transfer import GrantLease, StartPull
from pdlaunch.transfer.channel.handshake import draw_engine_id
from pdlaunch.transfer.channel.head_mapping import map_sources

LEASE_S = 600.0

TPPair = tuple[int, int]
"""TP sizes of the prefill side and of the decode side."""


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Says where KV caches lie."""

    device: str
    with_cumem: bool


def new_pair(
    stack: contextlib.ExitStack,
    settings: KVTransferSettings,
    pair: TPPair,
    shape: BenchShape,
    place: CachePlace,
) -> RankPair:
    """Start the ranks of a pair and connect them; ``stack`` stops them."""
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
    found = RankPair(sides[0], sides[1], engine_ids[0])
    found.connect(shape.num_kv_heads)
    return found


class RankPair:
    """Drives the prefill and the decode ranks of one pair, each in a process of its own."""

    def __init__(
        self, prefill_ranks: Sequence[Process], decode_ranks: Sequence[Process], engine_id: EngineId
    ) -> None:
        """``engine_id``: of the prefill ranks."""
        self.prefill_ranks, self.decode_ranks = prefill_ranks, decode_ranks
        self._engine_id, self._tp_size = engine_id, len(prefill_ranks)
        self._num_pulls = 0
        self.paths: set[str] = set()
        """The path in use, once connected."""

    def connect(self, num_kv_heads: int) -> None:
        """Let every decode rank shake hands with every prefill rank."""
        # Raises where the TP sizes do not fit, before anybody waits for a handshake.
        map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=self._tp_size,
            decode_tp_size=len(self.decode_ranks),
            decode_tp_rank=0,
        )
        processes = (*self.prefill_ranks, *self.decode_ranks)
        for process in processes:
            process.send("entry")
        entries = [process.wait() for process in processes]
        for rank in self.decode_ranks:
            rank.send("connect", entries, len(self.prefill_ranks))
        for rank in self.decode_ranks:
            self.paths |= rank.wait()

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
        for rank in self.prefill_ranks:
            rank.call("grant", grant)
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
        for rank in self.decode_ranks:
            rank.send("pull", command)
        times: list[PullTimes] = [rank.wait() for rank in self.decode_ranks]
        for rank in self.prefill_ranks:
            rank.call("ended")
        return PullTimes(max(time.pull_s for time in times), max(time.read_s for time in times))


class BareTransfers:
    """Moves blocks with the connector's library alone, in the processes of a pair and over their
    KV caches.
    """

    def __init__(self, kind: BareKind, ranks: RankPair, pair: TPPair, shape: BenchShape) -> None:
        self._kind, self._pair, self._shape = kind, pair, shape
        prefill_addresses, decode_addresses = (
            [rank.call("open_bare", kind) for rank in side]
            for side in (ranks.prefill_ranks, ranks.decode_ranks)
        )
        self._movers, addresses = (
            (ranks.decode_ranks, prefill_addresses)
            if kind.decode_side_moves
            else (ranks.prefill_ranks, decode_addresses)
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
        return part.decode_rank if self._kind.decode_side_moves else part.prefill_rank


def _device(device: str, index: int) -> str:
    return device if device == "cpu" else f"cuda:{index % torch.cuda.device_count()}"
