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
        self._ranks: dict[int, RankUp] = {}
        self._workers: dict[int, bytes] = {}  # their identities, by rank
        self._peers: Sequence[Entry] | None = None  # None: workers are told of nobody yet
        self.all_up = asyncio.Event()

    def write_setup(self, model_digest: str) -> Path:
        return write_setup(self._bootstrap, self._spec, self.endpoint, model_digest)

    @property
    def tp_size(self) -> int:
        return max((rank.tp_size for rank in self._ranks.values()), default=1)

    @property
    def engine_id(self) -> EngineId:
        """Return the id that all ranks have; empty until they are up."""
        return self._ranks[0].engine_id if self.all_up.is_set() else EngineId("")

    @property
    def side_channels(self) -> tuple[str, ...]:
        """Return where each rank listens; empty until all are up."""
        if not self.all_up.is_set():
            return ()
        return tuple(self._ranks[tp_rank].side_channel for tp_rank in range(self.tp_size))

    @property
    def progress(self) -> str:
        return f"{len(self._ranks)} of {self.tp_size} ranks exchange KV blocks"

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
        with contextlib.suppress(OSError):
            _setup_path(self._bootstrap).unlink()

    async def _take_rank(self, identity: bytes, rank: RankUp) -> None:
        self._ranks[rank.tp_rank], self._workers[rank.tp_rank] = rank, identity
        ids = {tp_rank: str(each.engine_id) for tp_rank, each in sorted(self._ranks.items())}
        if len({*ids.values()}) > 1:
            told = ", ".join(f"rank {tp_rank} has {each}" for tp_rank, each in ids.items())
            raise ProtocolError(f"its ranks differ in engine_id: {told}")
        if self._ranks.keys() >= {*range(self.tp_size)}:
            self.all_up.set()
        if self._peers is not None:
            await self._send_peers(identity)

    async def _send_peers(self, identity: bytes) -> None:
        frame = to_worker.encode(Peers(entries=list(self._peers or ())))
        await self._socket.send_multipart([identity, frame])


def write_setup(bootstrap: Bootstrap, spec: ConnectorSpec, link: str, model_digest: str) -> Path:
    """Leave what the connector reads at its start in a file for this user alone."""
    engine = engine_of_rank(bootstrap.name)
    setup = KVSetup(
        **msgspec.structs.asdict(spec),
        name=engine,
        # All ranks have it before any connector is made, on whichever host they are.
        engine_id=EngineId(f"{bootstrap.launch_id}/{engine}#{bootstrap.incarnation}"),
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


def _setup_path(bootstrap: Bootstrap) -> Path:
    return Path(bootstrap.run_dir) / f"{bootstrap.name.replace('/', '.')}.kv.json"


class RankPairs:
    """Collects which pairs of ranks are proven, by prefill engine."""

    def __init__(self, name: str) -> None:
        self._name = name  # of the decode engine
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

    def slowest(self, peer: Peer, tp_size: int) -> PairReady | None:
        """Return the slowest pair with an engine; None: ranks are missing.

        ``tp_size``: ranks of the decode engine. Each tells from how many ranks it pulls.
        """
        pairs = self._proven.get(peer, {}).values()
        for tp_rank in range(tp_size):
            own = [pair for pair in pairs if pair.local == rank_name(self._name, tp_rank)]
            if not own or len(own) < max(pair.num_peers for pair in own):
                return None
        return min(pairs, key=lambda pair: pair.gigabytes_per_s or float("inf"))
