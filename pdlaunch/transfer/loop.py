"""What the transfer thread does: ``receive -> advance -> publish``, once a turn. Single-threaded,
with an injected clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.errors import LeaseError
from pdlaunch.integrity.checksum import KVHasher
from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.memory.kv_memory import KVMemory
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.side_channel import Push
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    AnnounceBlocks,
    CancelPull,
    EndLease,
    GrantLease,
    SetLeaseReaders,
    StartPull,
    TransferCommand,
    TransferEvent,
    WithdrawBlocks,
)
from pdlaunch.transfer.channel.handshake import RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.channel.side_channel import DecodeSocket, PrefillSocket
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.connectors.scratch import scratch_bytes, write_pattern
from pdlaunch.transfer.decode_side.holder_link import Puller, engine_of
from pdlaunch.transfer.decode_side.peer_setup import PeerSetup
from pdlaunch.transfer.decode_side.peer_table import new_peer_table
from pdlaunch.transfer.decode_side.pull_table import PullTable
from pdlaunch.transfer.prefill_side.early import EarlyQuestions
from pdlaunch.transfer.prefill_side.holder import Holder, HolderCard
from pdlaunch.transfer.prefill_side.push import PushDesk

LONGEST_SLEEP_S = 60.0

SLEEP_SHARE = 1 / 32
"""Of the age of a READ, or of checksums that a device computes, to sleep between two looks at it:
what is short ends without delay, what is long with at most this much, and what is stalled costs
next to nothing."""
LONGEST_READ_SLEEP_S = 0.05


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The KV cache of this rank and its place in the model."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous."""
    layout: KVCacheLayout
    model_digest: str
    total_kv_heads: int
    first_kv_head: int
    source: KVMemory
    """What the KV cache was allocated from; the scratch lies beside it."""


class TransferLoop:
    """Leases, peers and pulls of one rank. Made by the transfer thread, used by it alone."""

    def __init__(
        self,
        *,
        context: SecureContext,
        prefill_socket: PrefillSocket,
        spec: EngineSpec,
        identity: RankIdentity,
        memory: RankMemory,
        connector: Connector,
        report: Callable[[ToSupervisor], None],
        alert: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        """Opens the connector. ``alert``: a pull begins to read so many bytes under its lease.
        Raises TransferError.
        """
        self._clock = clock
        self._engine, self._role = spec.name, spec.role
        self._entries: Sequence[Entry] = ()
        self._without_peers = False
        self._socket = prefill_socket
        self._connector = connector
        self._events: list[TransferEvent] = []
        scratch = _new_scratch(memory, connector.agent_name)
        local = LocalMemory(memory.kv_cache, scratch, memory.layout, memory.source)
        connector.open(local)
        compatibility = compatibility_of(
            spec,
            memory.layout,
            memory.kv_cache.dtype,
            model_digest=memory.model_digest,
            total_kv_heads=memory.total_kv_heads,
            connector=connector.name,
        )
        hasher = KVHasher(memory.kv_cache, memory.layout) if spec.kv_transfer.verify else None
        geometry = geometry_of(local, memory.first_kv_head)
        card = HolderCard(
            identity, compatibility, geometry, connector.agent_name, connector.agent_metadata()
        )
        self._holder = Holder(card, hasher, clock)
        self._early = EarlyQuestions(self._holder.is_early, clock)
        self._pushes = PushDesk(self._holder, connector, clock)
        setup = PeerSetup(
            identity=identity,
            compatibility=compatibility,
            head_bytes=memory.layout.head_bytes,
            connector=connector,
            open_channel=lambda endpoint: DecodeSocket(context, endpoint, watched=connector.pushes),
            handshake_timeout_s=spec.kv_transfer.handshake_timeout_s,
            clock=clock,
            report=report,
        )
        self._peers = new_peer_table(setup, eager=spec.role == "decode")
        puller = Puller(
            engine_id=identity.engine_id,
            tp_rank=identity.tp_rank,
            first_kv_head=memory.first_kv_head,
            head_bytes=memory.layout.head_bytes,
            hasher=hasher,
            clock=clock,
            emit=self._events.append,
            alert=alert,
        )
        self._pulls = PullTable(puller, self._peers)

    def execute(self, command: TransferCommand) -> None:
        """Take a command of the scheduler; what comes of it shows as events."""
        match command:
            case AnnounceBlocks():
                self._holder.announce(command)
            case WithdrawBlocks():
                self._holder.withdraw(command)
            case GrantLease():
                self._grant(command)
            case EndLease():
                self._holder.end(command)
            case SetLeaseReaders():
                self._holder.set_readers(command)
            case StartPull():
                self._pulls.start(command)
            case CancelPull():
                self._pulls.cancel(command)

    def update_registry(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        engine_ids = {entry.engine_id for entry in entries}
        self._early.drop_readers(lambda reader: engine_of(reader) in engine_ids)
        if not self._without_peers:
            self._peers.update(entries)

    def let_peers_go(self) -> None:
        """The memory is about to go: lose all peers, and take no new ones."""
        self._without_peers = True
        self._peers.lose_all("this engine falls asleep")

    def stay(self) -> None:
        """The memory stays after all."""
        self._without_peers = False
        self._peers.update(self._entries)

    @property
    def entries(self) -> Sequence[Entry]:
        """The latest registry."""
        return self._entries

    @property
    def idle(self) -> bool:
        """No lease, no pull of blocks, nothing that is written to a peer."""
        return not (
            self._holder.num_leases
            or self._pulls.hold_blocks
            or self._pushes.youngest_write_s is not None
        )

    @property
    def quiet(self) -> bool:
        """Nothing reads or writes the memory, and nothing can begin to: idle, and no peer is left,
        not even for a READ.
        """
        return self.idle and not self._peers.all()

    @property
    def reads_pending(self) -> bool:
        """READs may still write to memory of this rank, also after ``close``."""
        return any(peer.youngest_read_s is not None for peer in self._peers.all())

    @property
    def connected(self) -> bool:
        """Every rank of the registry that shakes hands at once has done so, in either direction, or
        cannot.
        """
        if any(peer.connecting for peer in self._peers.peers.values()):
            return False
        if self._role == "decode":
            return True
        pullers = {
            (entry.name, entry.incarnation)
            for entry in self._entries
            if entry.kind == "rank"
            and entry.role == "decode"
            and entry.engine != self._engine
            and entry.state == "ready"
        }
        return pullers <= self._holder.pullers

    def turn(self) -> list[TransferEvent]:
        """Receive what has arrived and do what is due; returns what has happened."""
        self._answer()
        # Readers are answered first, and read while the checksums are computed.
        if self._holder.advance_checksums():
            self._answer()
        self._peers.advance()
        self._pulls.advance()
        self._events += self._holder.take_ended()
        events = self._events[:]
        self._events.clear()
        return events

    def register(self, poller: zmq.Poller) -> None:
        """Add every socket that may have something to receive."""
        poller.register(self._socket.socket, zmq.POLLIN)
        for peer in self._peers.all():
            if peer.channel is not None:
                poller.register(peer.channel.socket, zmq.POLLIN)

    def sleep_s(self) -> float:
        """How long nothing is due, messages aside."""
        now_s = self._clock()
        deadlines_s = [
            now_s + LONGEST_SLEEP_S,
            self._pulls.next_deadline_s(),
            self._early.next_deadline_s(),
        ]
        deadlines_s += [peer.next_deadline_s() for peer in self._peers.all()]
        if (lease_s := self._holder.next_deadline_s()) is not None:
            deadlines_s.append(lease_s)
        started = [
            self._holder.youngest_hashing_s,
            self._pulls.youngest_hashing_s,
            self._pushes.youngest_write_s,
            *(peer.youngest_read_s for peer in self._peers.all()),
        ]
        polled_s = [started_s for started_s in started if started_s is not None]
        if polled_s:
            deadlines_s.append(
                now_s + min(LONGEST_READ_SLEEP_S, SLEEP_SHARE * (now_s - max(polled_s)))
            )
        return max(0.0, min(deadlines_s) - now_s)

    def close(self) -> None:
        """Let go of peers and memory; READs that are pending are abandoned, the process is about to
        exit.
        """
        for peer in self._peers.all():
            peer.lose("this rank is closing")
        self._connector.close()

    def _answer(self) -> None:
        """All questions that can be answered now."""
        for identity, message in self._early.sift(self._socket.receive()):
            if isinstance(message, Push) and self._connector.pushes:
                self._pushes.start(identity, message)
            else:
                self._socket.send(identity, self._holder.answer(message))
        for identity, ended in self._pushes.take_answers():
            self._socket.send(identity, ended)

    def _grant(self, command: GrantLease) -> None:
        try:
            self._holder.grant(command)
        except LeaseError as error:
            raise AssertionError(str(error)) from error


def _new_scratch(memory: RankMemory, agent_name: str) -> torch.Tensor:
    scratch = memory.source.zeros(scratch_bytes(memory.kv_cache.device))
    write_pattern(scratch, agent_name)
    return scratch
