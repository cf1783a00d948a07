"""Proves the pairs of one decode engine of vLLM with its prefill engines, over the workers of
pdlaunch's KV connector if the engine has it, and reports pairs that fail.

::

    setup file ──> connector: RankUp of each rank ──> all are up: register their side channels
    registry ──> Peers ──> handshakes of decode ranks ──> PairReady, PairFailed
    EngineCore ──> GrantLease ──> its workers

    Registry ──> prefill engines ──> all pairs of ranks shook hands? ──> canary ──> PairReady
                                     (with pdlaunch's connector)                └─> PairFailed
    failed pulls of workers, metrics of vLLM's connector, sleep of a prefill engine ──> PairSuspect
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from pdlaunch.errors import ProtocolError
from pdlaunch.http.canary import Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.engine_calls import Counts, EngineApi, FailedReads
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.launch.sidecar.engine import SidecarOptions, remove_setup
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.machine.ucx_log import ReadTransports, path_over
from pdlaunch.protocol import engine_link
from pdlaunch.protocol.certificates import client_context
from pdlaunch.protocol.control import Entry, PairFailed, PairReady, PairSuspect, Registry
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import GrantLease

_logger = logging.getLogger(__name__)


class EngineLink:
    """Receives messages of workers and sends them their peers. For use in the event loop only."""

    def __init__(
        self,
        context: SecureContext,
        bootstrap: Bootstrap,
        spec: engine_link.ConnectorSpec,
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
        self._ranks: dict[tuple[int, int], engine_link.RankUp] = {}
        self._workers: dict[tuple[int, int], bytes] = {}  # ZMQ identities
        self._peers: Sequence[Entry] | None = None  # None: workers did not get peers yet
        self.all_up = asyncio.Event()

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
            engine_link.rank_name(engine_link.dp_engine(name, dp_rank, spec.dp_size), tp_rank)
            for dp_rank in range(spec.dp_size)
            for tp_rank in range(self.tp_size)
        ]

    @property
    def progress(self) -> str:
        num_ranks = self.dp_size * self.tp_size
        return f"{len(self._ranks)} of {num_ranks} ranks exchange KV blocks"

    async def receive(self) -> engine_link.FromWorker:
        """Return the next message of a worker. Raises ProtocolError if its engine_id is wrong."""
        while True:
            identity, frame = await self._socket.recv_multipart()
            try:
                message: engine_link.FromEngine = engine_link.from_engine.decode(frame)
            except ProtocolError as error:
                _logger.warning("%r: %s", identity[:80], error)
                continue
            if isinstance(message, GrantLease):
                await self._grant(identity, frame)
                continue
            if isinstance(message, engine_link.RankUp):
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

    async def _take_rank(self, identity: bytes, rank: engine_link.RankUp) -> None:
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
        # Only to the workers of the data parallel rank that has sent it.
        engine = scheduler.rpartition(b"/")[0]
        for identity in self._workers.values():
            if identity.rpartition(b"/")[0] == engine:
                await self._socket.send_multipart([identity, frame])

    async def _send_peers(self, identity: bytes) -> None:
        frame = engine_link.to_worker.encode(engine_link.Peers(entries=list(self._peers or ())))
        await self._socket.send_multipart([identity, frame])


Peer = tuple[str, int]  # name and incarnation of a prefill engine


@dataclass(eq=False)
class EnginePairs:
    """Proves the pairs of a decode engine; does nothing in engines of other roles."""

    supervised: Supervised
    options: SidecarOptions
    api: EngineApi
    link: EngineLink | None  # None with vLLM's own connector, whose workers report nothing

    def __post_init__(self) -> None:
        self._name = self.supervised.bootstrap.name
        self._peers: dict[Peer, Entry] = {}  # ready prefill engines
        self._listed: set[Peer] = set()  # peers that the registry lists as proven
        # Pairs of ranks that shook hands: decode rank and prefill rank -> result
        self._rank_pairs: dict[Peer, dict[tuple[str, str], PairReady]] = defaultdict(dict)
        # One at a time, because the counters of bytes and seconds add up all READs of the engine.
        self.canaries = Canaries(self._send_canary, self._report, num_at_once=1)
        self._transports = ReadTransports()
        self._failed_reads = FailedReads()
        self._failed_pulls: dict[str, list[str]] = defaultdict(list)  # errors, by prefill engine

    def learn(self, registry: Registry) -> None:
        """Find the pairs to prove; drop the results of pairs that are gone or in doubt."""
        if not any(e.name == self._name and e.role == "decode" for e in registry.entries):
            return
        prefill = {
            (entry.name, entry.incarnation): entry
            for entry in registry.entries
            if entry.kind == "server" and entry.role == "prefill"
        }
        self._peers = {peer: entry for peer, entry in prefill.items() if entry.state == "ready"}
        for peer in [*self._rank_pairs]:
            # A sleeping engine frees its memory, so its ranks must repeat their handshakes.
            if peer not in prefill or prefill[peer].state == "sleeping":
                del self._rank_pairs[peer]
        listed = {(p.peer, p.peer_incarnation) for p in registry.pairs if p.local == self._name}
        # ``_listed - listed``: the supervisor has dropped these proofs; prove the pairs again.
        gone = self.canaries.pairs() - self._peers.keys()
        self.canaries.forget(gone | self._listed - listed)
        self._listed = listed
        for peer in listed & prefill.keys():
            if prefill[peer].state == "sleeping":
                self._doubt(peer, f"{peer[0]} sleeps")
        self._prove()

    def take(self, message: PairReady | PairFailed | engine_link.PullFailure) -> None:
        match message:
            case PairReady(local=local, peer=rank, peer_incarnation=incarnation):
                name = engine_link.engine_of_rank(rank)
                self._rank_pairs[name, incarnation][local, rank] = message
            case PairFailed(local=local, peer=rank):
                for pairs in self._rank_pairs.values():
                    pairs.pop((local, rank), None)
                names = {"local": self._name, "peer": engine_link.engine_of_rank(rank)}
                self.supervised.send(msgspec.structs.replace(message, **names))
            case engine_link.PullFailure(peer_engine=engine, error=reason):
                self._failed_pulls[engine].append(reason)
        self._prove()

    def look(self, counts: Counts) -> None:
        """Report the pairs whose READs have failed since the last call as suspect.

        pdlaunch's connector reports these pairs. vLLM's connector does not, so all pairs are
        suspect if every READ has failed: this engine then computes the prompts itself.
        """
        all_fail = self.link is None and self._failed_reads.look(counts)
        failed, self._failed_pulls = self._failed_pulls, defaultdict(list)
        for peer in self._listed:
            if all_fail:
                self._doubt(peer, "all READs of KV blocks fail")
            elif errors := failed.get(peer[0]):
                self._doubt(peer, f"{len(errors)} pulls have failed just now: {errors[-1]}")

    def _doubt(self, peer: Peer, error: str) -> None:
        name, incarnation = peer
        _logger.warning("%s -> %s: %s", name, self._name, error)
        self.supervised.send(
            PairSuspect(local=self._name, peer=name, peer_incarnation=incarnation, error=error)
        )

    def _prove(self) -> None:
        link = self.link
        self.canaries.prove([p for p in self._peers if link is None or self._slowest(link, p)])

    def _slowest(self, link: EngineLink, peer: Peer) -> PairReady | None:
        pairs = self._rank_pairs.get(peer, {}).values()
        return slowest(pairs, link.names, engine_link.dp_size_of(self._peers[peer]))

    async def _send_canary(self, peer: Peer) -> Proof:
        bootstrap, options = self.supervised.bootstrap, self.options
        url, certificate = self._peers[peer].address.http, bootstrap.keys.certificate
        api = EngineApi(url, bootstrap.engine_api_key)
        # Either all engines of a launch have doors, or none.
        if bootstrap.door is not None and certificate is not None:
            api = EngineApi(url, bootstrap.keys.http_token, client_context(certificate))
        theirs = engine_link.dp_size_of(self._peers[peer])
        ours = 1 if self.link is None else self.link.dp_size
        dp_pairs = [(their, our) for their in range(theirs) for our in range(ours)]
        try:
            # The slowest pair of data parallel ranks is the result for the pair of engines.
            proofs = [
                await send_canary(
                    api, self.api, options.model, is_exact=options.is_exact, dp_ranks=dp_ranks
                )
                for dp_ranks in (dp_pairs if len(dp_pairs) > 1 else [None])
            ]
            return min(proofs, key=lambda proof: proof.gigabytes_per_s or 0.0)
        finally:
            await api.close()

    def _report(self, peer: Peer, result: Proof | CanaryDied) -> None:
        name, incarnation = peer
        if isinstance(result, CanaryDied):
            error, fatal = str(result), result.fatal
            self.supervised.send(PairFailed(local=self._name, peer=name, error=error, fatal=fatal))
            return
        proof = PairReady(
            local=self._name,
            peer=name,
            peer_incarnation=incarnation,
            path=path_over("nixl/vLLM", self._transports.latest()),
            gigabytes_per_s=result.gigabytes_per_s,
        )
        if self.link is not None:
            of_ranks = self._slowest(self.link, peer)
            assert of_ranks is not None, "canaries of other pairs are stopped"
            proof = msgspec.structs.replace(of_ranks, local=self._name, peer=name, num_peers=1)
        self.supervised.send(proof)


def slowest(pairs: Collection[PairReady], ranks: Sequence[str], num_peers: int) -> PairReady | None:
    """Return the slowest pair of ranks with a prefill engine; None if pairs are missing.

    ``ranks``: all ranks of the decode engine. Each pulls from ``PairReady.num_peers`` ranks in
    each of the ``num_peers`` data parallel ranks of the prefill engine.
    """
    for rank in ranks:
        own = [pair for pair in pairs if pair.local == rank]
        if not own or len(own) < max(pair.num_peers for pair in own) * num_peers:
            return None
    return min(pairs, key=lambda pair: pair.gigabytes_per_s or float("inf"))
