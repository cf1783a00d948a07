"""Keeps the peers of this rank equal to the registry: the handshake with each prefill rank, the
connection to it, and the READs over that.

::

    idle ── want ──> asking ── compatible ──> probing ── a path is proven ──> ready
      any of them ── time-out, refusal, failed READ ──> waiting ── back-off over ──> asking
      any of them ── the engines do not fit ──> incompatible        (final)
      any of them ── gone from the registry ──> lost                (final, once READs have ended)

The destination of a READ belongs to it until it has ended. If the connector pushes, the
prefill rank writes: the READ ends with that rank's answer, or with the end of its process.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable
from typing import Literal

import torch

from pdlaunch.errors import HandshakeError, TransferError
from pdlaunch.protocol.control import Entry, PairFailed, PairReady
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.side_channel import (
    Geometry,
    Handshake,
    HandshakeReply,
    Push,
    PushEnded,
    Refused,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    PeerAgent,
    PushedRead,
    Read,
)
from pdlaunch.transfer.connectors.scratch import PathFigure, best_path, has_pattern, try_paths
from pdlaunch.transfer.handshake import (
    DecodeSetup,
    RankIdentity,
    SourceRank,
    check_geometry,
    compare,
)
from pdlaunch.transfer.side_channel import DecodeSocket

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 5.0
MAX_DOUBLINGS = 10
"""The back-off has reached its longest by then, and no number overflows however long a peer is
away.
"""

State = Literal["idle", "asking", "probing", "ready", "waiting", "incompatible", "lost"]


class Peer:
    """Keeps handshake, connection and READs of one incarnation of one prefill rank."""

    def __init__(self, identity: RankIdentity, endpoint: str, setup: DecodeSetup) -> None:
        self.identity = identity
        self.endpoint = endpoint
        self.name = identity.name
        self.path = ""
        """The path of its READs; empty before the first handshake."""
        self.error = "no handshake yet"
        """The reason why it is not ready."""
        self.state: State = "idle"
        self.channel: DecodeSocket | None = None
        self.deadline_at: float | None = None
        """Instant at which ``advance`` has something to do, READs and messages aside."""
        self._setup = setup
        self._call_ids = itertools.count(1)
        self._calls: dict[int, Callable[[ToDecodeSide], None]] = {}
        """Receivers of answers, by call_id."""
        self._geometry: Geometry | None = None
        self._connection: Connection | None = None
        self._old_connections: list[Connection] = []
        """Connections that were given up, kept while a READ may still write."""
        self._reads: dict[Read, float] = {}
        """READs that are not released, and when they started."""
        self._pushed: dict[int, PushedRead] = {}
        """READs that the prefill rank was asked to write, by call_id."""
        self._old_channel: DecodeSocket | None = None
        """Channel of a connection that was given up; still brings answers about ``_pushed``."""
        self._trial: Generator[None, None, list[PathFigure]] | None = None
        self._old_probes: list[tuple[Read, torch.Tensor]] = []
        """Abandoned READs of its scratch, each with the memory that it may still write to."""
        self._asked_at = 0.0
        self._num_failures = 0

    @property
    def is_connecting(self) -> bool:
        """Return whether somebody needs this peer, and it may still become ready."""
        return self.state in ("asking", "probing", "waiting")

    @property
    def is_gone(self) -> bool:
        return self.state in ("lost", "incompatible")

    @property
    def geometry(self) -> Geometry:
        """Return how its blocks lie; only of a peer that is ready."""
        assert self._geometry is not None
        return self._geometry

    @property
    def reading_since_at(self) -> float | None:
        """Return when the latest of the unfinished READs began."""
        return max(self._reads.values(), default=None)

    def want(self) -> None:
        """Shake hands, unless that is done or under way."""
        if self.state == "idle":
            self._start_handshake()

    def lose(self, reason: str) -> None:
        """Give the peer up for good. Pending READs still run to their end."""
        self._disconnect("lost", reason)

    def reconnect(self) -> None:
        """Make a new connection: a READ over this one has failed."""
        # In other states a new connection is under way anyway.
        if self.state == "ready":
            self._retry_later("a READ has failed")

    def advance(self) -> None:
        """Receive and do what is due; never waits."""
        for channel in (self.channel, self._old_channel):
            if channel is not None:
                for message in channel.receive():
                    self._on_message(message)
                if self._pushed and channel.broken:
                    # A process that is gone writes no more.
                    for read in self._pushed.values():
                        read.end("the peer's process has ended")
                    self._pushed.clear()
        for probe in [probe for probe in self._old_probes if probe[0].poll() != "pending"]:
            self._old_probes.remove(probe)
            self.release(probe[0])
        self._close_old_connections()
        if self.state == "probing":
            self._guard(self._try_paths)
        if self.deadline_at is not None and self.deadline_at <= self._setup.clock():
            self._on_deadline()

    def ask(
        self, build: Callable[[int], ToPrefillSide], on_reply: Callable[[ToDecodeSide], None] | None
    ) -> int:
        """Send the question that ``build`` makes from a new call_id; return the id. ``on_reply``
        gets the answer, if one comes.
        """
        call_id = next(self._call_ids)
        if on_reply is not None:
            self._calls[call_id] = on_reply
        # Without a channel the question is lost, as over a connection that breaks: pulls ask again.
        if self.channel is not None:
            self.channel.send(build(call_id))
        return call_id

    def forget(self, call_id: int) -> None:
        self._calls.pop(call_id, None)

    def read(self, blocks: BlockRead) -> Read:
        """Raise TransferError."""
        assert self._connection is not None
        self._check_channel()
        return self._started(self._connection.read(blocks), blocks)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        """Raise TransferError."""
        assert self._connection is not None
        self._check_channel()
        read, landing = self._connection.read_scratch(path)
        # To a prefill side that writes, no blocks mean the scratch.
        return self._started(read, BlockRead([], [], range(0), range(0))), landing

    def release(self, read: Read) -> None:
        read.release()
        del self._reads[read]
        self._close_old_connections()

    def abandon(self, read: Read, landing: torch.Tensor) -> None:
        """Keep the memory of a READ of the scratch until it has ended."""
        self._old_probes.append((read, landing))

    def _check_channel(self) -> None:
        """Raise TransferError when answers over this connection may be lost: no write must be asked
        for then.
        """
        if self._setup.connector.pushes and (self.channel is None or self.channel.broken):
            raise TransferError(f"the connection to {self.name} broke")

    def _started(self, read: Read, blocks: BlockRead) -> Read:
        self._reads[read] = self._setup.clock()
        if isinstance(read, PushedRead):
            assert self.channel is not None
            call_id = next(self._call_ids)
            self._pushed[call_id] = read
            self.channel.send(
                Push(
                    call_id=call_id,
                    engine_id=self.identity.engine_id,
                    lease_id=blocks.lease_id,
                    reader=blocks.reader,
                    block_ids=list(blocks.remote_blocks),
                    first_head=blocks.remote_heads.start,
                    num_heads=len(blocks.remote_heads),
                    target=read.target,
                )
            )
        return read

    def _on_message(self, message: ToDecodeSide) -> None:
        pushed = self._pushed.pop(message.call_id, None)
        if pushed is not None:
            match message:
                case PushEnded():
                    pushed.end("" if message.ok else message.error)
                case Refused():
                    pushed.end(message.reason or "refused")
                case _:
                    pushed.end(f"unexpected {type(message).__name__}")
        elif (on_reply := self._calls.pop(message.call_id, None)) is not None:
            on_reply(message)

    def _start_handshake(self) -> None:
        setup = self._setup
        self.state = "asking"
        self._asked_at = setup.clock()
        self.deadline_at = self._asked_at + setup.handshake_timeout_s
        self.channel = setup.open_channel(self.endpoint)
        self.ask(
            lambda call_id: Handshake(
                call_id=call_id,
                engine_id=setup.identity.engine_id,
                rank_name=setup.identity.name,
                incarnation=setup.identity.incarnation,
                expected_engine_id=self.identity.engine_id,
                compatibility=setup.compatibility,
                agent_metadata=setup.connector.agent_metadata(),
            ),
            lambda reply: self._guard(lambda: self._on_handshake_reply(reply)),
        )

    def _on_handshake_reply(self, reply: ToDecodeSide) -> None:
        if self.state != "asking":
            return
        if isinstance(reply, Refused):
            raise TransferError(f"{self.name} at {self.endpoint} refused: {reply.reason}")
        if not isinstance(reply, HandshakeReply):
            raise TransferError(f"{self.name} answered the handshake with {type(reply).__name__}")
        # If the peer has merely restarted, the next registry shows its new identity.
        for field in ("engine_id", "incarnation", "tp_rank", "tp_size"):
            wanted, found = getattr(self.identity, field), getattr(reply, field)
            if wanted != found:
                raise TransferError(
                    f"{field}: the registry shows {wanted!r} for {self.name} at {self.endpoint}, "
                    f"{reply.rank_name} answers with {found!r}"
                )
        setup = self._setup
        compare(setup.compatibility, reply.compatibility, local=setup.identity.name, peer=self.name)
        check_geometry(
            reply, head_bytes=setup.head_bytes, total_kv_heads=setup.compatibility.num_kv_heads
        )
        self._geometry = reply.geometry
        agent = PeerAgent(reply.agent_name, reply.agent_metadata, reply.geometry)
        self._connection = setup.connector.connect(agent)
        self.state = "probing"
        self._trial = try_paths(
            self,
            self._connection.paths(),
            is_right=lambda landing: has_pattern(landing, reply.agent_name),
            clock=setup.clock,
            # The rest of the handshake's time after question and answer.
            timeout_s=self._asked_at + setup.handshake_timeout_s - setup.clock(),
        )
        self._try_paths()

    def _try_paths(self) -> None:
        assert self._trial is not None
        try:
            next(self._trial)
        except StopIteration as end:
            self._trial = None
            try:
                best = best_path(end.value)
            except TransferError as error:
                raise TransferError(f"{self.name} cannot be read: {error}") from error
            others = {figure.path: str(figure) for figure in end.value if figure is not best}
            self._be_ready(best, others)

    def _be_ready(self, best: PathFigure, others: dict[str, str]) -> None:
        setup = self._setup
        assert self._connection is not None
        self._connection.use_path(best.path)
        self.path, self.state, self.error = best.path, "ready", ""
        self.deadline_at, self._num_failures = None, 0
        seconds = setup.clock() - self._asked_at
        logger.info("%s is read over %s, %s; others: %s", self.name, best.path, best, others)
        setup.report(
            PairReady(
                local=setup.identity.name,
                peer=self.name,
                peer_incarnation=self.identity.incarnation,
                seconds=seconds,
                path=best.path,
                gigabytes_per_s=best.gigabytes_per_s,
                other_paths=others,
                num_peers=len(setup.sources(self.identity.tp_size)),
            )
        )

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        # Also a TransferError, but another try would not help: the engines do not fit.
        except HandshakeError as error:
            logger.error("handshake with %s: %s", self.name, error)
            self._disconnect("incompatible", str(error))
            self._report_failure(fatal=True)
        except TransferError as error:
            self._retry_later(str(error))

    def _retry_later(self, reason: str) -> None:
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, MAX_DOUBLINGS)
        logger.warning("%s; next handshake in %.2f s", reason, backoff_s)
        self._disconnect("waiting", reason)
        self.deadline_at = self._setup.clock() + backoff_s
        self._report_failure(fatal=False)

    def _report_failure(self, *, fatal: bool) -> None:
        local = self._setup.identity.name
        self._setup.report(PairFailed(local=local, peer=self.name, error=self.error, fatal=fatal))

    def _on_deadline(self) -> None:
        if self.state == "waiting" and self._old_connections:
            # A peer cannot be connected twice, and a connection stays while a READ may still write.
            self.deadline_at = None
        elif self.state == "waiting":
            self._start_handshake()
        else:
            doing = "to the handshake" if self.state == "asking" else "to the first READ"
            self._retry_later(
                f"no answer {doing} from {self.name} at {self.endpoint} within "
                f"{self._setup.handshake_timeout_s:g} s"
            )

    def _disconnect(self, state: State, reason: str) -> None:
        """Give the connection up; it stays only as long as a READ may still write."""
        self.state, self.error, self.deadline_at = state, reason, None
        # Their answers would have come over this connection.
        self._calls.clear()
        if self._trial is not None:
            self._trial.close()
            self._trial = None
        if self.channel is not None and self._pushed:
            # It must bring answers about writes that are under way. No other channel is opened
            # before they have come.
            self._old_channel = self.channel
        elif self.channel is not None:
            self.channel.close()
        self.channel = None
        if self._connection is not None:
            self._old_connections.append(self._connection)
            self._connection = None
        self._close_old_connections()

    def _close_old_connections(self) -> None:
        if self._reads:
            return  # They may still write, and answers about them may still come.
        if self._old_channel is not None:
            self._old_channel.close()
            self._old_channel = None
        while self._old_connections:
            self._old_connections.pop().close()
        if self.state == "waiting" and self.deadline_at is None:
            self.deadline_at = self._setup.clock()


class PeerTable:
    """Keeps peers by name. A new incarnation is a new peer; the old one is kept while a READ may
    write.
    """

    def __init__(self, setup: DecodeSetup, *, eager: bool) -> None:
        """``eager``: shake hands with every prefill rank as soon as the registry shows it, not at
        the first pull.
        """
        self.peers: dict[str, Peer] = {}
        """The ranks in the registry, by name."""
        self._setup = setup
        self._eager = eager
        self._gone: list[Peer] = []
        """Lost peers with pending READs."""

    def update(self, entries: Iterable[Entry]) -> None:
        setup = self._setup
        ranks = [
            entry
            for entry in entries
            if entry.kind == "rank" and entry.engine != setup.identity.engine
        ]
        leaders = {entry.engine: entry for entry in ranks if entry.tp_rank == 0 and entry.engine_id}
        shown: dict[str, tuple[RankIdentity, str]] = {}
        wanted: set[str] = set()
        for entry in ranks:
            # Rank 0's engine_id counts: others are compared with it. A rank that sleeps has no
            # memory, and one that has just started no side channel.
            leader = leaders.get(entry.engine)
            has_started = entry.engine_id and entry.address.side_channel
            if leader is None or not has_started or entry.state == "sleeping":
                continue
            if entry.engine_id != leader.engine_id:
                self._report_disagreement(entry, leader)
                continue
            identity = RankIdentity(
                name=entry.name,
                engine=entry.engine,
                engine_id=entry.engine_id,
                incarnation=entry.incarnation,
                tp_rank=entry.tp_rank,
                tp_size=entry.tp_size,
            )
            shown[entry.name] = identity, entry.address.side_channel
            if self._eager and entry.role == "prefill":
                wanted.add(entry.name)
        for name, peer in list(self.peers.items()):
            # Gone, or present in another incarnation.
            if shown.get(name) != (peer.identity, peer.endpoint):
                reason = f"incarnation {peer.identity.incarnation} of {name} is gone"
                logger.info("%s", reason)
                peer.lose(reason)
                self._gone.append(self.peers.pop(name))
        for name, (identity, endpoint) in shown.items():
            if name not in self.peers:
                self.peers[name] = Peer(identity, endpoint, setup)
        for name in wanted:
            self.peers[name].want()

    def lose_all(self, reason: str) -> None:
        """Lose every peer, until the next update."""
        for peer in self.all():
            peer.lose(reason)
        self._gone.extend(self.peers.values())
        self.peers.clear()

    def all(self) -> list[Peer]:
        """Return the peers in the registry, and those that have left it and are still kept."""
        return [*self.peers.values(), *self._gone]

    def advance(self) -> None:
        for peer in self.all():
            peer.advance()
        self._gone = [peer for peer in self._gone if peer.reading_since_at is not None]

    def sources_of(self, engine_id: EngineId) -> list[tuple[SourceRank, Peer]]:
        """Return the ranks of an engine that this rank pulls from, and want them from now on.

        Raises TransferError when the engine or one of these ranks is not in the registry, or does
        not fit.
        """
        ranks = {
            peer.identity.tp_rank: peer
            for peer in self.peers.values()
            if peer.identity.engine_id == engine_id
        }
        if not ranks:
            raise TransferError(f"no engine with engine_id {engine_id} is in the registry")
        sources = self._setup.sources(next(iter(ranks.values())).identity.tp_size)
        missing = [source.tp_rank for source in sources if source.tp_rank not in ranks]
        if missing:
            raise TransferError(
                f"tp_rank {missing[0]} of engine_id {engine_id} is not in the registry"
            )
        for source in sources:
            ranks[source.tp_rank].want()
        return [(source, ranks[source.tp_rank]) for source in sources]

    def _report_disagreement(self, entry: Entry, leader: Entry) -> None:
        """Report that ranks of one TP group carry different engine_ids, which is a fault except
        briefly while an engine restarts.
        """
        error = HandshakeError(
            f"engine_id: {leader.name} at {leader.address.side_channel} has {leader.engine_id}, "
            f"{entry.name} at {entry.address.side_channel} has {entry.engine_id}"
        )
        logger.error("%s", error)
        fatal = entry.incarnation == leader.incarnation
        local = self._setup.identity.name
        self._setup.report(PairFailed(local=local, peer=entry.name, error=str(error), fatal=fatal))
