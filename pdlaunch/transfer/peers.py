"""Keeps one ``Peer`` for each rank in the registry that this rank may pull from: its handshake, its
connection and its READs.

::

    idle ── want ──> asking ── compatible ──> probing ── a path is proven ──> ready
      any of them ── time-out, refusal, failed READ ──> waiting ── back-off over ──> asking
      any of them ── the engines do not fit ──> incompatible        (final)
      any of them ── gone from the registry ──> lost                (final, once READs have ended)

A READ owns its destination blocks until it has ended. If the connector pushes, the prefill rank
writes: the READ ends with that rank's answer, or with the end of its process. Therefore a peer that
is no longer ready keeps its connection and channel until its READs have ended. Only then does it
begin a new handshake.
"""

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from operator import attrgetter
from typing import Literal

import torch

from pdlaunch.errors import HandshakeError, TransferError
from pdlaunch.protocol import side_channel
from pdlaunch.protocol.control import Entry, PairFailed, PairReady
from pdlaunch.protocol.ids import EngineId, LeaseId, ReaderId
from pdlaunch.transfer.connectors.connector import BlockRead, Connection, Read
from pdlaunch.transfer.connectors.scratch import PathFigure, best_path, new_landing, try_paths
from pdlaunch.transfer.handshake import DecodeSetup, SourceRank, check_geometry, compare, is_source
from pdlaunch.transfer.regions import BlockIds
from pdlaunch.transfer.side_channel import DecodeSocket

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 5.0
# Enough to reach the longest back-off; the limit keeps numbers from overflowing.
MAX_DOUBLINGS = 10

State = Literal["idle", "asking", "probing", "ready", "waiting", "incompatible", "lost"]
_identity_of = attrgetter("engine_id", "incarnation", "tp_rank", "tp_size", "address.side_channel")


class Peer:
    """Holds the handshake, connection and READs of one incarnation of one prefill rank."""

    def __init__(self, entry: Entry, setup: DecodeSetup) -> None:
        self.entry = entry
        self.name = entry.name
        self.path = ""  # the path of its READs; empty before the first handshake
        self.error = "no handshake yet"  # the reason why it is not ready
        self.state: State = "idle"
        self.channel: DecodeSocket | None = None
        # When ``advance`` must be called even if no READ ends and no message arrives.
        self.deadline_at: float | None = None
        self._setup = setup
        self._call_ids = itertools.count(1)
        # Callbacks for answers, by call_id.
        self._calls: dict[int, Callable[[side_channel.ToDecodeSide], None]] = {}
        self._geometry: side_channel.Geometry | None = None
        # The paths that the connector offers, by name; an error for each unusable path.
        self._paths: Mapping[str, Connection | TransferError] = {}
        self._piece_bytes = 0  # size of the pieces in READs of the peer's scratch
        self._reads: dict[Read, float] = {}  # READs that are not released, and when they started
        # READs whose Push was sent and not answered yet, by call_id.
        self._pushed: dict[int, Read] = {}
        self._trial: Generator[None, None, list[PathFigure]] | None = None
        # READs of the peer's scratch, each with the memory that the READ may still write to. The
        # last READ belongs to the trial, if there is one; the others were given up.
        self._probes: list[tuple[Read, torch.Tensor]] = []
        self._asked_at = 0.0
        self._num_failures = 0

    @property
    def is_gone(self) -> bool:
        return self.state in ("lost", "incompatible")

    @property
    def geometry(self) -> side_channel.Geometry:
        assert self._geometry is not None
        return self._geometry

    def reading_since(self) -> list[float]:
        """Return when the READs that are not released yet began."""
        return list(self._reads.values())

    def want(self) -> None:
        if self.state == "idle":
            self._start_handshake()

    def lose(self, reason: str) -> None:
        """Disconnect for good. Pending READs still run to their end."""
        self._disconnect("lost", reason)

    def reconnect(self) -> None:
        """Replace the connection, because a READ over it has failed."""
        # In the other states, the connection is being replaced already, or gone for good.
        if self.state == "ready":
            self._retry_later("a READ has failed")

    def advance(self) -> None:
        """Receive messages, release ended probes, try paths and check the deadline. Never waits."""
        if self.channel is not None:
            self._receive(self.channel)
        for probe in self._probes[:-1] if self._trial is not None else self._probes[:]:
            if probe[0].poll() != "pending":
                self.release(probe[0])
        self._close_when_unused()
        if self.state == "probing":
            self._guard(self._try_paths)
        if self.deadline_at is not None and self.deadline_at <= self._setup.clock():
            self._on_deadline()

    def ask(
        self,
        message: side_channel.ToPrefillSide,
        on_reply: Callable[[side_channel.ToDecodeSide], None] | None = None,
    ) -> None:
        """Number a message and send it; ``on_reply`` gets the answer, if one arrives."""
        message.call_id = next(self._call_ids)
        if on_reply is not None:
            self._calls[message.call_id] = on_reply
        assert self.channel is not None
        self.channel.send(message)

    def read(self, blocks: BlockRead, lease_id: LeaseId, reader: ReaderId) -> Read:
        connection = self._paths[self.path]
        assert isinstance(connection, Connection)
        self._check_channel()
        read = connection.read(blocks)
        self._follow(read, blocks.remote_blocks, blocks.remote_heads, lease_id, reader)
        return read

    def release(self, read: Read) -> None:
        read.release()
        del self._reads[read]
        self._probes = [probe for probe in self._probes if probe[0] is not read]
        self._close_when_unused()

    def _receive(self, channel: DecodeSocket) -> None:
        for message in channel.receive():
            if (pushed := self._pushed.pop(message.call_id, None)) is not None:
                pushed.end(_push_error(message))
            elif (on_reply := self._calls.pop(message.call_id, None)) is not None:
                on_reply(message)
        if self._pushed and channel.broken:
            # The peer's process has ended, so it cannot write any more.
            for read in self._pushed.values():
                read.end("the peer's process has ended")
            self._pushed.clear()

    def _read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        connection = self._paths[path]
        if isinstance(connection, TransferError):
            raise connection
        self._check_channel()
        memory, geometry = self._setup.memory, self.geometry
        landing, self._piece_bytes = new_landing(
            geometry.scratch_bytes,
            memory.scratch.device,
            # Size of the smallest piece in a READ of whole blocks between these two ranks.
            min(
                memory.kv.page_bytes,
                min(place.head_bytes for place in geometry.regions) * geometry.num_kv_heads,
            ),
        )
        read = connection.read_scratch(landing, self._piece_bytes)
        self._probes.append((read, landing))
        # A Push without blocks asks for the scratch.
        self._follow(read, (), range(0), LeaseId(""), ReaderId(""))
        return read, landing

    def _check_channel(self) -> None:
        """Raise TransferError if the connector pushes and the answer to a Push would be lost."""
        if self._setup.connector.pushes and (self.channel is None or self.channel.broken):
            raise TransferError(f"the connection to {self.name} broke")

    def _follow(
        self, read: Read, blocks: BlockIds, heads: range, lease_id: LeaseId, reader: ReaderId
    ) -> None:
        """Keep a READ until it is released. If it has a ``target``, send the peer a Push."""
        self._reads[read] = self._setup.clock()
        if (target := read.target) is None:
            return
        push = side_channel.Push(
            call_id=0,
            engine_id=self.entry.engine_id,
            lease_id=lease_id,
            reader=reader,
            block_ids=[list(group) for group in blocks],
            first_head=heads.start,
            num_heads=len(heads),
            target=target,
        )
        self.ask(push)
        self._pushed[push.call_id] = read

    def _start_handshake(self) -> None:
        setup = self._setup
        self.state = "asking"
        self._asked_at = setup.clock()
        self.deadline_at = self._asked_at + setup.settings.handshake_timeout_s
        self.channel = setup.open_channel(self.entry.address.side_channel)
        handshake = side_channel.Handshake(
            call_id=0,
            engine_id=self.entry.engine_id,
            rank_name=setup.identity.name,
            incarnation=setup.identity.incarnation,
        )
        self.ask(handshake, lambda reply: self._guard(lambda: self._on_handshake_reply(reply)))

    def _on_handshake_reply(self, reply: side_channel.ToDecodeSide) -> None:
        setup, entry, where = self._setup, self.entry, self.entry.address.side_channel
        if isinstance(reply, side_channel.Refused):
            raise TransferError(f"{self.name} at {where} refused: {reply.reason}")
        if not isinstance(reply, side_channel.HandshakeReply):
            raise TransferError(f"{self.name} answered the handshake with {type(reply).__name__}")
        # Not fatal: if the peer has restarted, the next registry shows its new identity.
        for field in ("engine_id", "incarnation", "tp_rank", "tp_size"):
            wanted, found = getattr(entry, field), getattr(reply, field)
            if wanted != found:
                raise TransferError(
                    f"{field}: the registry shows {wanted!r} for {self.name} at {where}, "
                    f"{reply.rank_name} answers with {found!r}"
                )
        compare(setup.compatibility, reply.compatibility, local=setup.identity.name, peer=self.name)
        check_geometry(reply, setup)
        self._geometry = reply.geometry
        self._paths = setup.connector.connect(reply)
        self.state = "probing"
        self._trial = try_paths(
            self._read_scratch,
            self.release,
            list(self._paths),
            agent_name=reply.agent_name,
            clock=setup.clock,
            # The time that the handshake has left.
            timeout_s=self._asked_at + setup.settings.handshake_timeout_s - setup.clock(),
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
            others = {self._named(each.path): str(each) for each in end.value if each is not best}
            self._be_ready(best, others)

    def _be_ready(self, best: PathFigure, others: dict[str, str]) -> None:
        setup = self._setup
        # The other connections stay open: READs over them that timed out may still write.
        self.path, self.state, self.error = best.path, "ready", ""
        self.deadline_at, self._num_failures = None, 0
        logger.info("%s is read over %s, %s; others: %s", self.name, best.path, best, others)
        setup.report(
            PairReady(
                local=setup.identity.name,
                peer=self.name,
                peer_incarnation=self.entry.incarnation,
                path=self._named(best.path),
                gigabytes_per_s=best.gigabytes_per_s,
                other_paths=others,
                piece_bytes=self._piece_bytes,
                num_peers=len(setup.sources(self.entry.tp_size)),
            )
        )

    def _named(self, path: str) -> str:
        connection = self._paths[path]
        return connection.named(path) if isinstance(connection, Connection) else path

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        # HandshakeError is a TransferError, but the engines are incompatible: do not retry.
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
        if self.state != "waiting":
            doing = "to the handshake" if self.state == "asking" else "to the first READ"
            self._retry_later(
                f"no answer {doing} from {self.name} at {self.entry.address.side_channel} within "
                f"{self._setup.settings.handshake_timeout_s:g} s"
            )
        elif self._reads:
            # Wait for the READs: they need the old connection, and a peer can have only one.
            self.deadline_at = None
        else:
            self._start_handshake()

    def _disconnect(self, state: State, reason: str) -> None:
        """Leave the connection, and close it once no READ can write over it any more."""
        self.state, self.error, self.deadline_at = state, reason, None
        # Pending questions get no answer any more.
        self._calls.clear()
        if self._trial is not None:
            self._trial.close()
            self._trial = None
        self._close_when_unused()

    def _close_when_unused(self) -> None:
        """Close an abandoned connection and its channel if no READ needs them."""
        if self.state in ("asking", "probing", "ready"):
            return
        # The channel is only needed for the answers to Push messages.
        if self.channel is not None and not self._pushed:
            self.channel.close()
            self.channel = None
        if self._reads:
            return
        for connection in self._paths.values():
            if isinstance(connection, Connection):
                connection.close()
        self._paths = {}
        if self.state == "waiting" and self.deadline_at is None:
            self.deadline_at = self._setup.clock()


def _push_error(message: side_channel.ToDecodeSide) -> str:
    """Return why the peer's write has failed; empty if all bytes have landed."""
    match message:
        case side_channel.PushEnded():
            return "" if message.ok else message.error
        case side_channel.Refused():
            return message.reason or "refused"
        case _:
            return f"unexpected {type(message).__name__}"


class PeerTable:
    """Holds the peers in the registry, and lost peers until their READs have ended."""

    def __init__(self, setup: DecodeSetup, *, eager: bool) -> None:
        """``eager``: start handshakes with prefill ranks when they are listed, not at a pull."""
        self.peers: dict[str, Peer] = {}  # the ranks in the registry, by name
        self._setup = setup
        self._eager = eager
        self._gone: list[Peer] = []  # lost peers with pending READs

    def update(self, entries: Iterable[Entry]) -> None:
        own = self._setup.identity.engine
        ranks = [entry for entry in entries if entry.kind == "rank" and entry.engine != own]
        leaders = {entry.engine: entry for entry in ranks if entry.tp_rank == 0 and entry.engine_id}
        shown: dict[str, Entry] = {}
        for entry in ranks:
            # All ranks must have rank 0's engine_id. Skip sleeping ranks, which have no KV cache,
            # and starting ranks, which have no side channel yet.
            leader = leaders.get(entry.engine)
            has_started = entry.engine_id and entry.address.side_channel
            if leader is None or not has_started or entry.state == "sleeping":
                continue
            if entry.engine_id != leader.engine_id:
                self._report_disagreement(entry, leader)
                continue
            shown[entry.name] = entry
        for name, peer in list(self.peers.items()):
            # The rank has left the registry or has another incarnation.
            if name not in shown or _identity_of(shown[name]) != _identity_of(peer.entry):
                reason = f"incarnation {peer.entry.incarnation} of {name} is gone"
                logger.info("%s", reason)
                peer.lose(reason)
                self._gone.append(self.peers.pop(name))
        num_heads = self._setup.compatibility.num_kv_heads
        for name, entry in shown.items():
            if name not in self.peers:
                self.peers[name] = Peer(entry, self._setup)
            is_read = is_source(num_heads, prefill=entry, decode=self._setup.identity)
            if self._eager and entry.role == "prefill" and is_read:
                self.peers[name].want()

    def lose_all(self, reason: str) -> None:
        for peer in self.all():
            peer.lose(reason)
        self._gone.extend(self.peers.values())
        self.peers.clear()

    def all(self) -> list[Peer]:
        """Return the peers in the registry, and lost peers with pending READs."""
        return [*self.peers.values(), *self._gone]

    def advance(self) -> None:
        for peer in self.all():
            peer.advance()
        self._gone = [peer for peer in self._gone if peer.reading_since()]

    def sources_of(self, engine_id: EngineId) -> list[tuple[SourceRank, Peer]]:
        """Return the ranks of an engine that this rank pulls from, and start missing handshakes.
        Raises TransferError.
        """
        found = (peer for peer in self.peers.values() if peer.entry.engine_id == engine_id)
        ranks = {peer.entry.tp_rank: peer for peer in found}
        if not ranks:
            raise TransferError(f"no engine with engine_id {engine_id} is in the registry")
        sources = self._setup.sources(next(iter(ranks.values())).entry.tp_size)
        for source in sources:
            if source.tp_rank not in ranks:
                raise TransferError(
                    f"tp_rank {source.tp_rank} of engine_id {engine_id} is not in the registry"
                )
        for source in sources:
            ranks[source.tp_rank].want()
        return [(source, ranks[source.tp_rank]) for source in sources]

    def _report_disagreement(self, entry: Entry, leader: Entry) -> None:
        """Report different engine_ids in a TP group: fatal, except while the engine restarts."""
        error = HandshakeError(
            f"engine_id: {leader.name} at {leader.address.side_channel} has {leader.engine_id}, "
            f"{entry.name} at {entry.address.side_channel} has {entry.engine_id}"
        )
        logger.error("%s", error)
        fatal = entry.incarnation == leader.incarnation
        local = self._setup.identity.name
        self._setup.report(PairFailed(local=local, peer=entry.name, error=str(error), fatal=fatal))
