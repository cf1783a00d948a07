"""Joins what a rank that is awake does over its connector: it lends blocks and pulls them, whatever
the role of its engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import Role
from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.side_channel import Compatibility, HandshakeReply
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import CancelPull, StartPull, TransferCommand, TransferEvent
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.connectors.scratch import scratch_bytes, write_pattern
from pdlaunch.transfer.handshake import DecodeSetup, RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.leases import PrefillSide
from pdlaunch.transfer.peers import PeerTable
from pdlaunch.transfer.pull import PullTable
from pdlaunch.transfer.regions import KVRegions, native_regions
from pdlaunch.transfer.side_channel import DecodeSocket, PrefillSocket

# The thread polls READs and checksums on a device, and sleeps between polls for this share of their
# age: it notices the end of a short READ without delay, of a long READ at most this share late, and
# a stalled READ costs next to nothing.
SLEEP_SHARE = 1 / 32
LONGEST_READ_SLEEP_S = 0.05


@dataclass(frozen=True, slots=True)
class TransferSetup:
    """Holds all that the transfers of one rank are made of."""

    identity: RankIdentity
    role: Role
    settings: KVTransferSettings
    compatibility: Compatibility
    kv: KVRegions  # must outlive the last READ of the process
    kv_memory: KVMemory  # allocator of the KV cache; the scratch comes from it, too
    first_kv_head: int
    connector: Connector
    context: SecureContext
    # Called from the transfer thread when it has events for the step loop, or has died.
    wake: Callable[[], None]
    # Tells the supervisor what it must know of this rank's pairs.
    report: Callable[[ToSupervisor], None]
    clock: Callable[[], float] = time.monotonic
    host: str = "127.0.0.1"  # address that the side channel listens on


def native_setup(
    spec: EngineSpec,
    identity: RankIdentity,
    kv_cache: torch.Tensor,
    layout: KVCacheLayout,
    *,
    connector: Connector,
    model_digest: str,
    total_kv_heads: int,
    **more: Any,
) -> TransferSetup:
    """Return the set-up of a rank of a native engine; ``kv_cache``: see ``native_regions``."""
    return TransferSetup(
        identity=identity,
        role=spec.role,
        settings=spec.kv_transfer,
        compatibility=compatibility_of(
            spec,
            layout,
            kv_cache.dtype,
            model_digest=model_digest,
            total_kv_heads=total_kv_heads,
            connector=connector.name,
        ),
        kv=native_regions(kv_cache, layout),
        connector=connector,
        **more,
    )


class TransferSides:
    """Owns leases, peers and pulls of an awake rank. The transfer thread alone uses it."""

    def __init__(self, setup: TransferSetup, socket: PrefillSocket) -> None:
        """Open the connector. Raises TransferError."""
        identity, connector, settings = setup.identity, setup.connector, setup.settings
        self._setup = setup
        self._socket = socket
        self._events: list[TransferEvent] = []
        self._lets_peers_go = False
        scratch = setup.kv_memory.zeros(scratch_bytes(setup.kv.device))
        # Peers read the pattern to prove the path. It follows from the agent's name, so that memory
        # of another rank, or of an earlier incarnation, is not mistaken for it.
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
            emit=self._events.append,
        )
        # Decode ranks connect as soon as the registry shows a prefill rank: a pair is proven before
        # it gets traffic.
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
        if not self._lets_peers_go:
            self._peers.update(entries)

    def turn(self) -> list[TransferEvent]:
        """Receive what has arrived, do what is due, and return what has happened."""
        # Answers first: others wait for them, while READs of this rank move by themselves. Peers
        # before pulls: what a peer receives is what lets its pulls go on.
        self._events += self._prefill.turn(self._socket.receive())
        self._peers.advance()
        self._pulls.advance()
        events = self._events[:]
        # Cleared in place: pulls hold the ``append`` of this very list.
        self._events.clear()
        return events

    def register(self, poller: zmq.Poller) -> None:
        for peer in self._peers.all():
            if peer.channel is not None:
                poller.register(peer.channel.socket, zmq.POLLIN)

    def sleep_s(self, longest_s: float) -> float:
        """Return how long nothing is due, messages aside; at most ``longest_s``."""
        now, peers = self._setup.clock(), self._peers.all()
        due_at = [*self._prefill.leases.deadlines(), *self._pulls.deadlines()]
        due_at += [peer.deadline_at for peer in peers if peer.deadline_at is not None]
        # READs and checksums on a device have no socket that could wake the thread.
        polled = [*self._prefill.polling_since(), *self._pulls.hashing_since()]
        polled += [began_at for peer in peers for began_at in peer.reading_since()]
        if polled:
            due_at.append(now + min(LONGEST_READ_SLEEP_S, SLEEP_SHARE * (now - max(polled))))
        return min([longest_s, *(max(0.0, at - now) for at in due_at)])

    @property
    def is_idle(self) -> bool:
        """Return whether there is no lease, no pull of blocks and no write to a peer."""
        return self._prefill.is_idle and not self._pulls.hold_blocks

    @property
    def is_quiet(self) -> bool:
        """Return whether nothing uses the memory or can begin to: idle, and without peers."""
        return self.is_idle and not self._peers.all()

    @property
    def has_pending_reads(self) -> bool:
        """Return whether READs may still write to memory of this rank, also after ``close``."""
        return any(peer.reading_since() for peer in self._peers.all())

    def is_connected_to(self, entries: Sequence[Entry]) -> bool:
        setup = self._setup
        if any(peer.is_connecting for peer in self._peers.peers.values()):
            return False
        # Decode ranks begin the handshake; this side knows those that have come.
        return setup.role == "decode" or self._prefill.known_ranks.issuperset(
            (entry.name, entry.incarnation)
            for entry in entries
            if entry.kind == "rank"
            and entry.role == "decode"
            and entry.engine != setup.identity.engine
            and entry.state == "ready"
        )

    def let_peers_go(self) -> None:
        """Lose all peers and take no new ones: the memory is about to go."""
        self._lets_peers_go = True
        self._peers.lose_all("this engine falls asleep")

    def take_peers_back(self, entries: Sequence[Entry]) -> None:
        """Connect again: the memory stays after all."""
        self._lets_peers_go = False
        self._peers.update(entries)

    def close(self) -> None:
        """Let go of peers and memory, and of pending READs: the process is about to exit."""
        # Peers first: their connections belong to a connector that is open.
        for peer in self._peers.all():
            peer.lose("this rank is closing")
        self._setup.connector.close()
