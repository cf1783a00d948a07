"""Runs the transfers of one rank in a thread, whatever the role of its engine: it leases blocks to
peers and pulls blocks from them. Only this thread uses the connector, the side channel and the KV
blocks that are leased or pulled.

The step loop submits ``TransferCommand``s and takes ``TransferEvent``s; it never waits for a peer.
One turn of the thread::

    inbox ──> commands ──> leases ──────> peers ──────> pulls ───────> events ──> step loop
      ▲       registry     answer decode  handshake,    ask, READ,        │
      │       suspend      ranks; hash    receive       prove             │
      │       resume       leased blocks                                  │
      └──────────── sleep until a socket, the inbox or a deadline <───────┘

    awake ── suspend, once no lease, pull or READ is left ──> asleep ── resume ──> awake
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import zmq

from pdlaunch.errors import TransferError
from pdlaunch.machine.host import sleep_precisely
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol.control import Entry
from pdlaunch.protocol.side_channel import HandshakeReply, Refused
from pdlaunch.protocol.transfer import CancelPull, StartPull, TransferCommand, TransferEvent
from pdlaunch.transfer.connectors.connector import LocalMemory
from pdlaunch.transfer.connectors.scratch import DEVICE_SCRATCH_BYTES, SCRATCH_BYTES, write_pattern
from pdlaunch.transfer.handshake import DecodeSetup, TransferSetup, geometry_of, is_source
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.leases import PrefillSide
from pdlaunch.transfer.peers import PeerTable
from pdlaunch.transfer.pull import PullTable
from pdlaunch.transfer.side_channel import DecodeSocket, PrefillSocket

logger = logging.getLogger(__name__)

CONFIRMATION_S = 5.0  # time for the transfer thread to answer after its deadline
LONGEST_SLEEP_S = 60.0
# Shorter sleeps are skipped. ``SLEEP_SHARE`` of 3 ms: the thread spins during younger READs.
SHORTEST_SLEEP_S = 0.0001
# Longest sleep while the thread waits to suspend.
SUSPENSION_SLEEP_S = 0.01
# The thread polls READs and device checksums, and sleeps between polls for this share of their age.
# So the end of a short READ is seen at once, the end of a long READ at most this share late, and a
# stalled READ costs almost no CPU time.
SLEEP_SHARE = 1 / 32
LONGEST_READ_SLEEP_S = 0.05


class TransferSides:
    """Owns the leases, peers and pulls of an awake rank. Only the transfer thread uses it."""

    def __init__(
        self, setup: TransferSetup, socket: PrefillSocket, emit: Callable[[TransferEvent], None]
    ) -> None:
        """Open the connector. Raises TransferError."""
        identity, connector, settings = setup.identity, setup.connector, setup.settings
        self._setup = setup
        self._socket = socket
        self._emit = emit
        self._releases_peers = False
        is_cpu = setup.kv.device.type == "cpu"
        scratch = setup.kv_memory.zeros(SCRATCH_BYTES if is_cpu else DEVICE_SCRATCH_BYTES)
        # Peers read the pattern to prove the path. The pattern is derived from the agent's name, so
        # that memory of another rank or an earlier incarnation has another pattern.
        write_pattern(scratch, connector.agent_name)
        memory = LocalMemory(setup.kv, scratch, setup.kv_memory)
        connector.open(memory)
        hasher = KVHasher(setup.kv) if settings.verify else None
        card = HandshakeReply(
            call_id=0,
            engine_id=identity.engine_id,
            rank_name=identity.name,
            incarnation=identity.incarnation,
            tp_rank=identity.tp_rank,
            tp_size=identity.tp_size,
            compatibility=setup.compatibility,
            geometry=geometry_of(memory, setup.first_kv_head),
            agent_name=connector.agent_name,
            agent_metadata=connector.agent_metadata(),
        )
        self._prefill = PrefillSide(card, hasher, connector, socket.send, setup.clock)
        decode_setup = DecodeSetup(
            identity=identity,
            compatibility=setup.compatibility,
            memory=memory,
            first_kv_head=setup.first_kv_head,
            connector=connector,
            hasher=hasher,
            open_channel=lambda endpoint: DecodeSocket(
                setup.context, endpoint, watched=connector.pushes
            ),
            settings=settings,
            clock=setup.clock,
            report=setup.report,
            emit=emit,
        )
        # Decode ranks connect as soon as the registry shows a prefill rank, so that a pair is
        # proven before it gets traffic.
        self._peers = PeerTable(decode_setup, eager=setup.role == "decode")
        self._pulls = PullTable(decode_setup, self._peers)

    def execute(self, command: TransferCommand) -> None:
        match command:
            case StartPull():
                self._pulls.start(command)
            case CancelPull():
                self._pulls.cancel(command)
            case _:
                self._prefill.execute(command)

    def update_registry(self, entries: Sequence[Entry]) -> None:
        if not self._releases_peers:
            self._peers.update(entries)

    def turn(self) -> None:
        # Answer first: other ranks wait for the answers, while this rank's READs need no help.
        # Advance peers before pulls, because pulls use the answers that peers receive.
        for ended in self._prefill.turn(self._socket.receive()):
            self._emit(ended)
        self._peers.advance()
        self._pulls.advance()

    def register(self, poller: zmq.Poller) -> None:
        for peer in self._peers.all():
            if peer.channel is not None:
                poller.register(peer.channel.socket, zmq.POLLIN)

    def sleep_s(self, longest_s: float) -> float:
        """Return how long the thread may wait for messages; at most ``longest_s``."""
        now, peers = self._setup.clock(), self._peers.all()
        due_at = [*self._prefill.leases.deadlines(), *self._pulls.deadlines()]
        due_at += [peer.deadline_at for peer in peers if peer.deadline_at is not None]
        # No socket wakes the thread when a READ ends or a device has computed checksums.
        polled = [*self._prefill.polling_since(), *self._pulls.hashing_since()]
        polled += [began_at for peer in peers for began_at in peer.reading_since()]
        if polled:
            due_at.append(now + min(LONGEST_READ_SLEEP_S, SLEEP_SHARE * (now - max(polled))))
        return min([longest_s, *(max(0.0, at - now) for at in due_at)])

    def is_connected_to(self, entries: Sequence[Entry]) -> bool:
        setup = self._setup
        states = {peer.state for peer in self._peers.peers.values()}
        if not states.isdisjoint(("asking", "probing", "waiting")):
            return False
        # Decode ranks start handshakes: a prefill rank checks which decode ranks have sent one.
        return setup.role == "decode" or self._prefill.known_ranks.issuperset(
            (entry.name, entry.incarnation)
            for entry in entries
            if entry.kind == "rank"
            and entry.role == "decode"
            and entry.engine != setup.identity.engine
            and entry.state == "ready"
            and is_source(setup.compatibility.num_kv_heads, prefill=setup.identity, decode=entry)
        )

    def release_peers(self) -> bool:
        """Disconnect all peers and accept no new peers, once there is no lease, no pull that owns
        blocks and no write to a peer. Return True if nothing uses the memory any more.
        """
        # Not earlier, because pulls from a lost peer fail.
        if not self._prefill.is_idle or self._pulls.hold_blocks:
            return False
        self._releases_peers = True
        self._peers.lose_all("this engine falls asleep")
        return not self._peers.all()

    def readmit_peers(self, entries: Sequence[Entry]) -> None:
        """Connect again, because the memory is not freed after all."""
        self._releases_peers = False
        self._peers.update(entries)

    def close(self) -> bool:
        """Disconnect the peers and close the connector. Return False if a READ may still write."""
        # Peers first: their connections can only be closed while the connector is open.
        for peer in self._peers.all():
            peer.lose("this rank is closing")
        self._setup.connector.close()
        return not any(peer.reading_since() for peer in self._peers.all())


class TransferThread:
    """Executes the transfer commands of one rank. All methods may be called from any thread. Only
    ``wait_started``, ``suspend``, ``resume``, ``wait_unmapped`` and ``close`` block.
    """

    def __init__(self, setup: TransferSetup) -> None:
        """Bind the side channel and start the thread, which opens the connector. The caller has set
        the environment variables of ``KVTransferSettings.environment``.
        """
        self._name = setup.identity.name
        self._clock = setup.clock
        self._connector = setup.connector
        self._wake_engine = setup.wake
        # Functions for the thread to call; None ends the thread.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self._entries: Sequence[Entry] = ()
        # None while the rank sleeps, so that the KV cache can be freed.
        self._sides: TransferSides | None = None
        # Deadline of a suspension, and the future that its caller waits for.
        self._suspension: tuple[float, Future[None]] | None = None
        # True if the handshakes with all peers have ended since the last ``resume``. ``wake`` is
        # called when this becomes true.
        self.connected = True
        self._started = threading.Event()
        # Why the thread has died. Not the exception: its traceback would keep the KV cache alive.
        self._error: str | None = None
        self._wake_lock = threading.Lock()
        self._wake, self._woken = setup.context.pair(
            f"transfer-wake/{self._name}#{setup.identity.incarnation}"
        )
        self._socket = PrefillSocket(setup.context, tcp_endpoint(setup.host, 0))
        self.endpoint = self._socket.endpoint
        self._setup = setup
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        if commands:
            self._put(partial(self._execute, commands))

    def update_registry(self, entries: Sequence[Entry]) -> None:
        self._put(partial(self._take_registry, entries))

    def take_events(self) -> list[TransferEvent]:
        """Return the events since the last call. Raises TransferError if the thread has died."""
        if self._error is not None:
            raise TransferError(f"the transfer thread has died: {self._error}")
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def wait_started(self, timeout_s: float) -> None:
        """Wait until the connector is open and the thread answers peers. Raises TransferError."""
        if not self._started.wait(timeout_s):
            raise TransferError(f"the connector did not start within {timeout_s:g} s")
        if self._error is not None:
            raise TransferError(f"the connector cannot start: {self._error}")

    def suspend(self, timeout_s: float) -> None:
        """Wait until no transfer uses the memory, disconnect peers and deregister the memory. Then
        the rank refuses questions of peers. Raises TransferError if a transfer has not ended by
        ``timeout_s``; the rank stays awake.
        """
        done: Future[None] = Future()
        deadline_at = self._clock() + timeout_s
        self._put(lambda: setattr(self, "_suspension", (deadline_at, done)))
        _await(done, timeout_s + CONFIRMATION_S)

    def resume(self, timeout_s: float) -> None:
        """Register the memory again and start new handshakes with the peers in the registry; see
        ``connected``. Raises TransferError if the connector does not open.
        """
        done: Future[None] = Future()
        self._put(partial(self._resume, done))
        _await(done, timeout_s)

    def wait_unmapped(self, timeout_s: float) -> bool:
        """While suspended, wait until no peer maps this memory; False after ``timeout_s``."""
        return self._connector.wait_unmapped(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Stop the thread, which closes the connector and the sockets. Give up after ``timeout_s``:
        the process then exits by ``os._exit``.
        """
        self._put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the transfer thread did not end within %g s", timeout_s)

    def _put(self, item: Callable[[], None] | None) -> None:
        self._inbox.put(item)
        # Any thread may come here, but only one at a time may use a socket. Ignore a full pipe,
        # which wakes the thread anyway, and a closed socket: the thread has ended.
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake.send(b"", zmq.NOBLOCK)

    # All methods below run in the thread.

    def _run(self) -> None:
        sleep_precisely()
        try:
            self._sides = TransferSides(self._setup, self._socket, self._events.put)
            self._started.set()
            try:
                # Commands first, so that a question about a lease is answered in the turn of its
                # grant.
                while self._execute_inbox():
                    self._turn()
                    self._sleep()
            finally:
                self._close_sides()
        except zmq.ContextTerminated:
            return  # The process exits without a call of ``close``.
        except Exception as error:
            logger.exception("the transfer thread has died")
            self._error = str(error)
            self._wake_engine()
        finally:
            del self._setup  # so that the KV cache can be freed
            self._started.set()  # ``wait_started`` then raises the error.
            self._socket.close()
            with self._wake_lock:
                self._woken.close()
                self._wake.close()

    def _execute_inbox(self) -> bool:
        with contextlib.suppress(queue.Empty):
            while (item := self._inbox.get_nowait()) is not None:
                item()
            return False
        return True

    def _execute(self, commands: Sequence[TransferCommand]) -> None:
        # Rank 0 puts ranks to sleep only if no request, lease or pull holds a block, and schedules
        # no request before all ranks are awake.
        assert self._sides is not None, f"{self._name} sleeps and got {commands}"
        for command in commands:
            self._sides.execute(command)

    def _take_registry(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        if self._sides is not None:
            self._sides.update_registry(entries)

    def _turn(self) -> None:
        if self._sides is None:
            # A peer that asks a sleeping rank tries again later.
            for identity, message in self._socket.receive():
                reason = f"{self._name} is asleep"
                self._socket.send(identity, Refused(call_id=message.call_id, reason=reason))
        else:
            self._sides.turn()
            if not self._events.empty():
                self._wake_engine()
        if self._suspension is not None:
            self._advance_suspension(*self._suspension)
        if not self.connected and self._sides is not None:
            self.connected = self._sides.is_connected_to(self._entries)
            if self.connected:
                self._wake_engine()

    def _sleep(self) -> None:
        sleep_s = LONGEST_SLEEP_S if self._suspension is None else SUSPENSION_SLEEP_S
        if self._sides is not None:
            sleep_s = self._sides.sleep_s(sleep_s)
        if sleep_s < SHORTEST_SLEEP_S:
            time.sleep(0)  # Let other threads take the interpreter lock.
            return
        if sleep_s < 0.001:
            # The resolution of ``poll`` is a millisecond.
            time.sleep(sleep_s)
            sleep_s = 0.0
        # A new poller for each sleep, because peers may open and close channels in every turn.
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._socket.socket, zmq.POLLIN)
        if self._sides is not None:
            self._sides.register(poller)
        # Round up: before the deadline there is nothing to do.
        if self._woken in dict(poller.poll(math.ceil(sleep_s * 1000))):
            with contextlib.suppress(zmq.Again):
                while True:
                    self._woken.recv(zmq.NOBLOCK)

    def _advance_suspension(self, deadline_at: float, done: Future[None]) -> None:
        """Close the sides once nothing uses the memory; at the deadline, connect peers again."""
        if self._sides is None or self._sides.release_peers():
            # Before the future is done, because the caller then frees the memory at once.
            self._close_sides()
            self._suspension = None
            done.set_result(None)
        elif self._clock() >= deadline_at:
            self._sides.readmit_peers(self._entries)
            self._suspension = None
            done.set_exception(TransferError("a KV transfer of this rank has not ended"))

    def _resume(self, done: Future[None]) -> None:
        if self._sides is None:
            try:
                self._sides = TransferSides(self._setup, self._socket, self._events.put)
            except TransferError as error:
                # A new exception: the traceback would keep the KV cache alive.
                done.set_exception(TransferError(str(error)))
                return
            self._sides.update_registry(self._entries)
            # The engine takes requests again after the handshakes with its peers.
            self.connected = False
        done.set_result(None)

    def _close_sides(self) -> None:
        # A READ cannot be cancelled and may still write to the KV cache: keep that alive.
        if self._sides is not None and self._sides.close():
            self._sides = None


def _await(done: Future[None], timeout_s: float) -> None:
    try:
        done.result(timeout_s)
    except TimeoutError:
        message = f"the transfer thread did not answer within {timeout_s:g} s"
        raise TransferError(message) from None
