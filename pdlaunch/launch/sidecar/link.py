"""Exchanges messages with pdlaunch's KV connector in the workers of one vLLM engine.

::

    setup file ──> connector: RankUp of each rank ──> all are up: register their side channels
    registry ──> Peers ──> handshakes of decode ranks ──> PairReady, PairFailed
    EngineCore ──> GrantLease ──> its workers
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from pdlaunch.errors import ProtocolError
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.control import Entry
from pdlaunch.protocol.engine_link import (
    ConnectorSpec,
    FromEngine,
    FromWorker,
    KVSetup,
    Peers,
    RankUp,
    dp_engine,
    engine_of_rank,
    from_engine,
    rank_name,
    to_worker,
)
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext
from pdlaunch.protocol.transfer import GrantLease

_logger = logging.getLogger(__name__)


class EngineLink:
    """Receives messages of workers and sends them their peers. For use in the event loop only."""

    def __init__(
        self,
        context: SecureContext,
        bootstrap: Bootstrap,
        spec: ConnectorSpec,
        *,
        over_hosts: bool = False,
    ) -> None:
        """Listen at a Unix socket; ``over_hosts``: at TCP, for workers on other hosts."""
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
        # Both by data parallel and tensor parallel rank
        self._ranks: dict[tuple[int, int], RankUp] = {}
        self._workers: dict[tuple[int, int], bytes] = {}  # ZMQ identities
        self._peers: Sequence[Entry] | None = None  # None: workers did not get peers yet
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
        return self._spec.engine_id if self.all_up.is_set() else EngineId("")

    @property
    def side_channels(self) -> tuple[str, ...]:
        if not self.all_up.is_set():
            return ()
        return tuple(rank.side_channel for _, rank in sorted(self._ranks.items()))

    @property
    def names(self) -> list[str]:
        """Return the names of all ranks, ordered by data parallel rank and tensor parallel rank."""
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
        """Return the next message of a worker. Raises ProtocolError if its engine_id is wrong."""
        while True:
            identity, frame = await self._socket.recv_multipart()
            try:
                message: FromEngine = from_engine.decode(frame)
            except ProtocolError as error:
                _logger.warning("%r: %s", identity[:80], error)
                continue
            if isinstance(message, GrantLease):
                await self._grant(identity, frame)
                continue
            if isinstance(message, RankUp):
                await self._take_rank(identity, message)
            return message

    async def send_peers(self, entries: Sequence[Entry]) -> None:
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
            raise ProtocolError(f"its engine_id must be {wanted}, but {at} has {rank.engine_id}")
        if len(self._ranks) == self._spec.dp_size * rank.tp_size:
            self.all_up.set()
        if self._peers is not None:
            await self._send_peers(identity)

    async def _grant(self, scheduler: bytes, frame: bytes) -> None:
        engine = scheduler.rpartition(b"/")[0]
        for identity in self._workers.values():
            if identity.rpartition(b"/")[0] == engine:
                await self._socket.send_multipart([identity, frame])

    async def _send_peers(self, identity: bytes) -> None:
        frame = to_worker.encode(Peers(entries=list(self._peers or ())))
        await self._socket.send_multipart([identity, frame])


def write_setup(bootstrap: Bootstrap, spec: ConnectorSpec, link: str, model_digest: str) -> Path:
    """Write the setup file that the connector reads at its start, with mode 0600; return it."""
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
    """Remove the setup file, if it exists."""
    with contextlib.suppress(OSError):
        _setup_path(bootstrap).unlink()


def _setup_path(bootstrap: Bootstrap) -> Path:
    return Path(bootstrap.run_dir) / f"{bootstrap.name.replace('/', '.')}.kv.json"
