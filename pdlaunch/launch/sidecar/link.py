"""Speaks with pdlaunch's KV connector in the workers of one engine of vLLM.

::

    setup file ──> connector: RankUp of each rank ──> all are up: side channels for the registry
    registry ──> Peers ──> handshakes of decode ranks ──> PairReady, PairFailed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from pdlaunch.errors import ProtocolError
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.control import Entry, PairFailed, PairReady
from pdlaunch.protocol.engine_link import (
    ConnectorSpec,
    FromWorker,
    KVSetup,
    Peers,
    RankUp,
    dp_engine,
    engine_of_rank,
    from_worker,
    rank_name,
    to_worker,
)
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext

_logger = logging.getLogger(__name__)

Peer = tuple[str, int]  # name and incarnation of a prefill engine


class EngineLink:
    """Receives from the workers and tells them their peers; belongs to the event loop."""

    def __init__(
        self,
        context: SecureContext,
        bootstrap: Bootstrap,
        spec: ConnectorSpec,
        *,
        over_hosts: bool = False,
    ) -> None:
        """``over_hosts``: workers on other hosts connect, too."""
        self._bootstrap = bootstrap
        self._spec = spec
        path = f"ipc://{Path(bootstrap.run_dir) / bootstrap.name}.kv"
        self._socket, self.endpoint = context.listen(
            zmq.ROUTER,
            tcp_endpoint(spec.bind_address, 0) if over_hosts else path,
            socket_class=zmq.asyncio.Socket,
        )
        if over_hosts:
            port = int(self.endpoint.rpartition(":")[2])
            self.endpoint = tcp_endpoint(spec.advertise_address, port)
        # By data parallel and tensor parallel rank
        self._ranks: dict[tuple[int, int], RankUp] = {}
        self._workers: dict[tuple[int, int], bytes] = {}  # their identities
        self._peers: Sequence[Entry] | None = None  # None: workers are told of nobody yet
        self.all_up = asyncio.Event()

    def write_setup(self, model_digest: str) -> Path:
        return write_setup(self._bootstrap, self._spec, self.endpoint, model_digest)

    @property
    def dp_size(self) -> int:
        return self._spec.dp_size

    @property
    def tp_size(self) -> int:
        return max((rank.tp_size for rank in self._ranks.values()), default=1)

    @property
    def engine_id(self) -> EngineId:
        """Return the id of the engine as a whole; empty until all ranks are up."""
        return self._spec.engine_id if self.all_up.is_set() else EngineId("")

    @property
    def side_channels(self) -> tuple[str, ...]:
        """Return where each rank listens, those of data parallel rank 0 first; empty until all are
        up.
        """
        if not self.all_up.is_set():
            return ()
        return tuple(rank.side_channel for _, rank in sorted(self._ranks.items()))

    @property
    def names(self) -> list[str]:
        """Return the names of all ranks."""
        spec, name = self._spec, self._bootstrap.name
        return [
            rank_name(dp_engine(name, dp_rank, spec.dp_size), tp_rank)
            for dp_rank in range(spec.dp_size)
            for tp_rank in range(self.tp_size)
        ]

    @property
    def progress(self) -> str:
        num_ranks = self.dp_size * self.tp_size
        return f"{len(self._ranks)} of {num_ranks} ranks exchange KV blocks"

    async def receive(self) -> FromWorker:
        """Return what a worker says next. Raises ProtocolError when engine_ids differ."""
        while True:
            identity, frame = await self._socket.recv_multipart()
            try:
                message = from_worker.decode(frame)
            except ProtocolError as error:
                _logger.warning("%r: %s", identity[:80], error)
                continue
            if isinstance(message, RankUp):
                await self._take_rank(identity, message)
            return message

    async def tell_peers(self, entries: Sequence[Entry]) -> None:
        """Tell all workers which ranks other engines have, if that has changed."""
        if entries != self._peers:
            self._peers = entries
            for identity in self._workers.values():
                await self._send_peers(identity)

    def close(self) -> None:
        self._socket.close()
        remove_setup(self._bootstrap)

    async def _take_rank(self, identity: bytes, rank: RankUp) -> None:
        key, wanted = (rank.dp_rank, rank.tp_rank), self._spec.id_of(rank.dp_rank)
        self._ranks[key], self._workers[key] = rank, identity
        if rank.engine_id != wanted:
            at = f"rank {rank.tp_rank}" + f" of DP rank {rank.dp_rank}" * (self._spec.dp_size > 1)
            raise ProtocolError(f"its engine_id is {wanted}, and {at} has {rank.engine_id}")
        if len(self._ranks) == self._spec.dp_size * rank.tp_size:
            self.all_up.set()
        if self._peers is not None:
            await self._send_peers(identity)

    async def _send_peers(self, identity: bytes) -> None:
        frame = to_worker.encode(Peers(entries=list(self._peers or ())))
        await self._socket.send_multipart([identity, frame])


def write_setup(bootstrap: Bootstrap, spec: ConnectorSpec, link: str, model_digest: str) -> Path:
    """Leave what the connector reads at its start in a file for this user alone."""
    setup = KVSetup(
        **msgspec.structs.asdict(spec),
        name=engine_of_rank(bootstrap.name),
        incarnation=bootstrap.incarnation,
        keys=LaunchKeys(bootstrap.keys.public, bootstrap.keys.secret, http_token=""),
        link=link,
        model_digest=model_digest,
    )
    path = _setup_path(bootstrap)
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(setup))
    return path


def remove_setup(bootstrap: Bootstrap) -> None:
    """Remove that file, if it is there."""
    with contextlib.suppress(OSError):
        _setup_path(bootstrap).unlink()


def _setup_path(bootstrap: Bootstrap) -> Path:
    return Path(bootstrap.run_dir) / f"{bootstrap.name.replace('/', '.')}.kv.json"


class RankPairs:
    """Collects which pairs of ranks are proven, by prefill engine."""

    def __init__(self) -> None:
        self._proven: dict[Peer, dict[tuple[str, str], PairReady]] = defaultdict(dict)

    def add(self, pair: PairReady) -> None:
        peer = engine_of_rank(pair.peer), pair.peer_incarnation
        self._proven[peer][pair.local, pair.peer] = pair

    def drop(self, failed: PairFailed) -> None:
        for pairs in self._proven.values():
            pairs.pop((failed.local, failed.peer), None)

    def keep(self, peers: Collection[Peer]) -> None:
        """Drop the proofs of all other engines."""
        for peer in self._proven.keys() - set(peers):
            del self._proven[peer]

    def slowest(self, peer: Peer, ranks: Sequence[str], num_peers: int) -> PairReady | None:
        """Return the slowest pair with an engine; None: ranks are missing.

        ``ranks``: of the decode engine. Each states from how many ranks it pulls, for each of
        the other engine's ``num_peers`` data parallel ranks.
        """
        pairs = self._proven.get(peer, {}).values()
        for rank in ranks:
            own = [pair for pair in pairs if pair.local == rank]
            if not own or len(own) < max(pair.num_peers for pair in own) * num_peers:
                return None
        return min(pairs, key=lambda pair: pair.gigabytes_per_s or float("inf"))
