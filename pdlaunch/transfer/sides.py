"""Both sides of an awake rank's transfers: it leases its blocks to peers and pulls blocks from
them, whatever the role of its engine.
"""

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
from pdlaunch.transfer.handshake import (
    DecodeSetup,
    RankIdentity,
    compatibility_of,
    geometry_of,
    is_source,
)
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.leases import PrefillSide
from pdlaunch.transfer.peers import PeerTable
from pdlaunch.transfer.pull import PullTable
from pdlaunch.transfer.regions import KVRegions, native_regions
from pdlaunch.transfer.side_channel import DecodeSocket, PrefillSocket

# The thread polls READs and device checksums, and sleeps between polls for this share of their age.
# So the end of a short READ is seen at once, the end of a long READ at most this share late, and a
# stalled READ costs almost no CPU time.
SLEEP_SHARE = 1 / 32
LONGEST_READ_SLEEP_S = 0.05


@dataclass(frozen=True, slots=True)
class TransferSetup:
    """Holds the settings, memory and callbacks for the transfers of one rank."""

    identity: RankIdentity
    role: Role
    settings: KVTransferSettings
    compatibility: Compatibility
    kv: KVRegions  # must outlive the last READ of the process
    kv_memory: KVMemory  # allocates the KV cache and the scratch
    first_kv_head: int
    connector: Connector
    context: SecureContext
    # The transfer thread calls this when it has events for the step loop, and when it dies.
    wake: Callable[[], None]
    # Sends reports about this rank's pairs to the supervisor.
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
    """Return the set-up of a native engine's rank; ``kv_cache``: see ``native_regions``."""
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
    """Owns the leases, peers and pulls of an awake rank. Only the transfer thread uses it."""

    def __init__(self, setup: TransferSetup, socket: PrefillSocket) -> None:
        """Open the connector. Raises TransferError."""
        identity, connector, settings = setup.identity, setup.connector, setup.settings
        self._setup = setup
        self._socket = socket
        self._events: list[TransferEvent] = []
        self._releases_peers = False
        scratch = setup.kv_memory.zeros(scratch_bytes(setup.kv.device))
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
            emit=self._events.append,
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

    def turn(self) -> list[TransferEvent]:
        """Answer decode ranks, advance peers and pulls, and return the events."""
        # Answer first: other ranks wait for the answers, while this rank's READs need no help.
        # Advance peers before pulls, because pulls use the answers that peers receive.
        self._events += self._prefill.turn(self._socket.receive())
        self._peers.advance()
        self._pulls.advance()
        events = self._events[:]
        # Clear the list in place: ``decode_setup.emit`` is its ``append``.
        self._events.clear()
        return events

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

    @property
    def is_idle(self) -> bool:
        """Return True if there is no lease, no pull that owns blocks and no write to a peer."""
        return self._prefill.is_idle and not self._pulls.hold_blocks

    @property
    def is_quiet(self) -> bool:
        """Return True if idle and without peers: nothing uses the memory or can begin to."""
        return self.is_idle and not self._peers.all()

    @property
    def has_pending_reads(self) -> bool:
        """Return True if READs may still write to memory of this rank, even after ``close``."""
        return any(peer.reading_since() for peer in self._peers.all())

    def is_connected_to(self, entries: Sequence[Entry]) -> bool:
        setup = self._setup
        if any(peer.is_connecting for peer in self._peers.peers.values()):
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

    def release_peers(self) -> None:
        """Disconnect all peers and accept no new peers, because the memory will be freed."""
        self._releases_peers = True
        self._peers.lose_all("this engine falls asleep")

    def readmit_peers(self, entries: Sequence[Entry]) -> None:
        """Connect again, because the memory is not freed after all."""
        self._releases_peers = False
        self._peers.update(entries)

    def close(self) -> None:
        """Disconnect the peers and close the connector. Pending READs are abandoned."""
        # Peers first: their connections can only be closed while the connector is open.
        for peer in self._peers.all():
            peer.lose("this rank is closing")
        self._setup.connector.close()
