"""Keeps the handshake and the connection to a peer: one incarnation of one prefill rank.

::

    idle ── want ──> asking ── compatible ──> probing ── a path is proven ──> ready
      any of them ── time-out, refusal, failed READ ──> waiting ── back-off over ──> asking
      any of them ── the engines do not fit ──> incompatible        (final)
      any of them ── gone from the registry ──> lost                (final, once READs have ended)
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from enum import Enum, auto

import torch

from pdlaunch.errors import HandshakeError, TransferError
from pdlaunch.protocol.control import PairFailed, PairReady
from pdlaunch.protocol.side_channel import (
    Geometry,
    Handshake,
    HandshakeReply,
    Refused,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.transfer.channel.handshake import check_geometry, compare
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    PeerAgent,
    PushedRead,
    Read,
)
from pdlaunch.transfer.connectors.path_choice import PathFigure, PathTrial
from pdlaunch.transfer.connectors.scratch import has_pattern
from pdlaunch.transfer.decode_side.asked_pushes import AskedPushes
from pdlaunch.transfer.decode_side.links import Channel, LinkStatus, PeerAddress, PeerSetup
from pdlaunch.transfer.instants import is_due

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 5.0
MAX_DOUBLINGS = 10
"""Failures are counted up to here. The back-off has reached its longest by then, and no number
overflows however long a peer is away.
"""


class _State(Enum):
    IDLE = auto()
    ASKING = auto()
    PROBING = auto()
    READY = auto()
    WAITING = auto()
    INCOMPATIBLE = auto()
    LOST = auto()


_STATUS: dict[_State, LinkStatus] = {
    _State.READY: "ready",
    _State.INCOMPATIBLE: "incompatible",
    _State.LOST: "lost",
}


class Peer:
    """Keeps handshake, connection and READs of one peer; a ``PrefillLink`` for its pulls."""

    def __init__(self, address: PeerAddress, setup: PeerSetup) -> None:
        self.address = address
        self.name = address.identity.name
        self.path = ""
        self.error = "no handshake yet"
        self.channel: Channel | None = None
        self._setup = setup
        self._state = _State.IDLE
        self._call_ids = itertools.count(1)
        self._calls: dict[int, Callable[[ToDecodeSide], None]] = {}
        """Receivers of answers, by call_id."""
        self._connection: Connection | None = None
        self._old_connections: list[Connection] = []
        """Connections that were given up, kept while a READ may still write."""
        self._geometry: Geometry | None = None
        self._reads: dict[Read, float] = {}
        """READs that are not released, and when they started."""
        self._pushes = AskedPushes(address.identity, setup.connector, self._call_ids)
        self._trial: PathTrial | None = None
        self._old_probes: list[tuple[Read, torch.Tensor]] = []
        """READs of its scratch that nobody waits for, each with the memory that it may write to."""
        self._asked_at = 0.0
        self._deadline_at: float | None = None
        self._num_failures = 0

    @property
    def status(self) -> LinkStatus:
        return _STATUS.get(self._state, "connecting")

    @property
    def connecting(self) -> bool:
        """Return whether somebody needs this peer, and it may still become ready."""
        return self._state in (_State.ASKING, _State.PROBING, _State.WAITING)

    @property
    def geometry(self) -> Geometry:
        assert self._geometry is not None
        return self._geometry

    @property
    def closed(self) -> bool:
        """Return whether it is lost, and no READ can write any more."""
        return self._state is _State.LOST and not self._reads

    @property
    def reading_since_at(self) -> float | None:
        """Return when the latest of the unfinished READs began."""
        return max(self._reads.values(), default=None)

    def next_deadline_at(self) -> float | None:
        """Return when ``advance`` has something to do, READs and messages aside."""
        return self._deadline_at

    def want(self) -> None:
        """Shake hands, unless that is done or under way: somebody needs this peer."""
        if self._state is _State.IDLE:
            self._start_handshake()

    def lose(self, reason: str) -> None:
        """Give the peer up for good. READs that are pending still end."""
        self.error = reason
        self._disconnect()
        self._state = _State.LOST
        self._deadline_at = None

    def reconnect(self) -> None:
        """Make a new connection: a READ over this one has failed."""
        # In other states a new connection is under way anyway.
        if self._state is _State.READY:
            self._retry_later("a READ has failed")

    def advance(self) -> None:
        """Receive and do what is due; never waits."""
        self._receive()
        self._release_old()
        if self._state is _State.PROBING:
            self._guard(self._try_paths)
        if is_due(self._deadline_at, self._setup.clock()):
            self._on_deadline()

    def ask(
        self, build: Callable[[int], ToPrefillSide], on_reply: Callable[[ToDecodeSide], None] | None
    ) -> int:
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
        """Start to read. Raises TransferError."""
        assert self._connection is not None
        self._pushes.check_channel(self.channel)
        return self._started(self._connection.read(blocks), blocks)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        """Start to read the scratch. Raises TransferError."""
        assert self._connection is not None
        self._pushes.check_channel(self.channel)
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

    def _started(self, read: Read, blocks: BlockRead) -> Read:
        self._reads[read] = self._setup.clock()
        if isinstance(read, PushedRead):
            self._pushes.ask(self.channel, read, blocks)
        return read

    def _receive(self) -> None:
        for channel in (self.channel, self._pushes.old_channel):
            if channel is not None:
                for message in channel.receive():
                    self._on_message(message)
                self._pushes.end_those_of_the_dead(channel)

    def _start_handshake(self) -> None:
        setup, peer = self._setup, self.address.identity
        self._state = _State.ASKING
        self._asked_at = setup.clock()
        self._deadline_at = self._asked_at + setup.handshake_timeout_s
        self.channel = setup.open_channel(self.address.endpoint)
        self.ask(
            lambda call_id: Handshake(
                call_id=call_id,
                engine_id=setup.identity.engine_id,
                rank_name=setup.identity.name,
                incarnation=setup.identity.incarnation,
                expected_engine_id=peer.engine_id,
                compatibility=setup.compatibility,
                agent_metadata=setup.connector.agent_metadata(),
            ),
            lambda reply: self._guard(lambda: self._on_handshake_reply(reply)),
        )

    def _on_message(self, message: ToDecodeSide) -> None:
        """Pass an answer on, or drop it when nobody waits for it any more."""
        if self._pushes.take_answer(message):
            return
        on_reply = self._calls.pop(message.call_id, None)
        if on_reply is not None:
            on_reply(message)

    def _on_handshake_reply(self, reply: ToDecodeSide) -> None:
        if self._state is not _State.ASKING:
            return
        if isinstance(reply, Refused):
            raise TransferError(f"{self.name} at {self.address.endpoint} refused: {reply.reason}")
        if not isinstance(reply, HandshakeReply):
            raise TransferError(f"{self.name} answered the handshake with {type(reply).__name__}")
        self._check_identity(reply)
        local = self._setup.identity.name
        compare(self._setup.compatibility, reply.compatibility, local=local, peer=self.name)
        check_geometry(
            reply,
            head_bytes=self._setup.head_bytes,
            total_kv_heads=self._setup.compatibility.num_kv_heads,
        )
        self._geometry = reply.geometry
        connector = self._setup.connector
        self._connection = connector.connect(
            PeerAgent(reply.agent_name, reply.agent_metadata, reply.geometry)
        )
        self._state = _State.PROBING
        self._trial = PathTrial(
            self,
            self._connection.paths(),
            is_right=lambda landing: has_pattern(landing, reply.agent_name),
            clock=self._setup.clock,
            # What question and answer have left of the time for the handshake.
            timeout_s=self._asked_at + self._setup.handshake_timeout_s - self._setup.clock(),
        )
        self._try_paths()

    def _check_identity(self, reply: HandshakeReply) -> None:
        """Check that the rank that answers is the one in the registry. If the peer has merely
        restarted, the next registry shows its new identity. Raises TransferError.
        """
        expected = self.address.identity
        for field in ("engine_id", "incarnation", "tp_rank", "tp_size"):
            wanted, found = getattr(expected, field), getattr(reply, field)
            if wanted != found:
                raise TransferError(
                    f"{field}: the registry shows {wanted!r} for {self.name} at "
                    f"{self.address.endpoint}, "
                    f"{reply.rank_name} answers with {found!r}"
                )

    def _try_paths(self) -> None:
        trial = self._trial
        assert trial is not None
        if not trial.advance():
            return
        try:
            best = trial.best()
        except TransferError as error:
            raise TransferError(f"{self.name} cannot be read: {error}") from error
        self._trial = None
        others = {figure.path: str(figure) for figure in trial.figures if figure is not best}
        self._be_ready(best, others)

    def _be_ready(self, best: PathFigure, others: dict[str, str]) -> None:
        setup = self._setup
        assert self._connection is not None
        self._connection.use_path(best.path)
        self.path = best.path
        self._state = _State.READY
        self._deadline_at = None
        self._num_failures = 0
        self.error = ""
        seconds = setup.clock() - self._asked_at
        logger.info(
            "%s is ready to be read over %s, %s, after %.3f s; other paths: %s",
            self.name,
            best.path,
            best,
            seconds,
            others,
        )
        setup.report(
            PairReady(
                local=setup.identity.name,
                peer=self.name,
                peer_incarnation=self.address.identity.incarnation,
                seconds=seconds,
                path=best.path,
                gigabytes_per_s=best.gigabytes_per_s,
                other_paths=others,
                num_peers=len(setup.sources(self.address.identity.tp_size)),
            )
        )

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a step of the handshake; what it raises decides how the handshake goes on."""
        try:
            step()
        # It is a TransferError, too, but no other try would help: the engines do not fit.
        except HandshakeError as error:
            self._give_up(error)
        except TransferError as error:
            self._retry_later(str(error))

    def _give_up(self, error: HandshakeError) -> None:
        self.error = str(error)
        logger.error("handshake with %s: %s", self.name, error)
        self._disconnect()
        self._state = _State.INCOMPATIBLE
        self._deadline_at = None
        self._setup.report(
            PairFailed(
                local=self._setup.identity.name, peer=self.name, error=self.error, fatal=True
            )
        )

    def _retry_later(self, reason: str) -> None:
        self.error = reason
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, MAX_DOUBLINGS)
        logger.warning("%s; next handshake in %.2f s", reason, backoff_s)
        self._disconnect()
        self._state = _State.WAITING
        self._deadline_at = self._setup.clock() + backoff_s
        self._setup.report(
            PairFailed(local=self._setup.identity.name, peer=self.name, error=reason, fatal=False)
        )

    def _on_deadline(self) -> None:
        if self._state is _State.WAITING and self._old_connections:
            # A peer cannot be connected twice, and a connection stays while a READ may still write.
            self._deadline_at = None
        elif self._state is _State.WAITING:
            self._start_handshake()
        else:
            doing = "to the handshake" if self._state is _State.ASKING else "to the first READ"
            timeout_s = self._setup.handshake_timeout_s
            self._retry_later(
                f"no answer {doing} from {self.name} at {self.address.endpoint} within "
                f"{timeout_s:g} s"
            )

    def _disconnect(self) -> None:
        """Give the connection up; it stays only as long as a READ may still write."""
        # Their answers would have come over this connection.
        self._calls.clear()
        if self.channel is not None:
            self._pushes.retire(self.channel)
            self.channel = None
        if self._trial is not None:
            self._trial.abandon()
            self._trial = None
        if self._connection is not None:
            self._old_connections.append(self._connection)
            self._connection = None
        self._release_old()

    def _release_old(self) -> None:
        ended = [read for read, _ in self._old_probes if read.poll() != "pending"]
        self._old_probes = [probe for probe in self._old_probes if probe[0] not in ended]
        for read in ended:
            self.release(read)
        self._close_old_connections()

    def _close_old_connections(self) -> None:
        if self._reads:
            return  # They may still write, and answers about them may still come.
        self._pushes.close_old_channel()
        while self._old_connections:
            self._old_connections.pop().close()
        if self._state is _State.WAITING and self._deadline_at is None:
            self._deadline_at = self._setup.clock()
