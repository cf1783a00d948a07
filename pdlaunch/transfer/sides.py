"""Builds both sides of a rank's transfers over one connector: the prefill side lends blocks, the
decode side pulls them. Every rank has both, whatever the role of its engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.memory.kv_memory import KVMemory
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import CancelPull, StartPull, TransferCommand, TransferEvent
from pdlaunch.transfer.channel.handshake import RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.channel.side_channel import DecodeSocket, PrefillSocket
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.connectors.scratch import scratch_bytes, write_pattern
from pdlaunch.transfer.decode_side.links import PeerSetup, PullSetup
from pdlaunch.transfer.decode_side.side import DecodeSide
from pdlaunch.transfer.instants import earliest, latest
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.prefill_side.answers import RankCard
from pdlaunch.transfer.prefill_side.side import PrefillSide

SLEEP_SHARE = 1 / 32
"""The thread looks at READs, and at checksums that a device computes, and sleeps between two looks
for this share of their age. So the end of a short one is noticed without delay, that of a long one
at most this share late, and a stalled one costs next to nothing.
"""
LONGEST_READ_SLEEP_S = 0.05


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Describes the KV cache of this rank and its place in the model."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; must outlive the
    last READ of the process.
    """
    layout: KVCacheLayout
    source: KVMemory
    """Allocator of the KV cache; the scratch comes from it, too."""
    model_digest: str
    total_kv_heads: int
    first_kv_head: int

    def __post_init__(self) -> None:
        assert self.kv_cache.is_contiguous()
        assert tuple(self.kv_cache.shape[1:]) == self.layout.block_shape()


@dataclass(frozen=True, slots=True)
class TransferSetup:
    """Holds all that the transfers of one rank are made of."""

    spec: EngineSpec
    identity: RankIdentity
    memory: RankMemory
    connector: Connector
    context: SecureContext
    wake: Callable[[], None]
    """Called from the transfer thread when it has events for the step loop, or has died."""
    report: Callable[[ToSupervisor], None]
    """Tells the supervisor what it must know of this rank's pairs."""
    clock: Callable[[], float] = time.monotonic
    host: str = "127.0.0.1"
    """Address that the side channel listens on."""


class TransferSides:
    """Owns leases, peers and pulls of one rank that is awake. The transfer thread makes it and
    alone uses it.
    """

    def __init__(self, setup: TransferSetup, socket: PrefillSocket) -> None:
        """Open the connector. Raises TransferError."""
        spec, identity, memory = setup.spec, setup.identity, setup.memory
        connector, clock = setup.connector, setup.clock
        self._setup = setup
        self._events: list[TransferEvent] = []
        local = _open(connector, memory)
        compatibility = compatibility_of(
            spec,
            memory.layout,
            memory.kv_cache.dtype,
            model_digest=memory.model_digest,
            total_kv_heads=memory.total_kv_heads,
            connector=connector.name,
        )
        hasher = KVHasher(memory.kv_cache, memory.layout) if spec.kv_transfer.verify else None
        card = RankCard(
            identity,
            compatibility,
            geometry_of(local, memory.first_kv_head),
            connector.agent_name,
            connector.agent_metadata(),
        )
        self._prefill = PrefillSide(card, socket, connector, hasher, clock)
        peer_setup = PeerSetup(
            identity=identity,
            compatibility=compatibility,
            head_bytes=memory.layout.head_bytes,
            connector=connector,
            open_channel=lambda endpoint: DecodeSocket(
                setup.context, endpoint, watched=connector.pusher is not None
            ),
            handshake_timeout_s=spec.kv_transfer.handshake_timeout_s,
            clock=clock,
            report=setup.report,
        )
        pull_setup = PullSetup(
            engine_id=identity.engine_id,
            tp_rank=identity.tp_rank,
            first_kv_head=memory.first_kv_head,
            head_bytes=memory.layout.head_bytes,
            hasher=hasher,
            clock=clock,
            emit=self._events.append,
        )
        # Decode ranks connect as soon as the registry shows a prefill rank: a pair is proven before
        # it gets traffic.
        self._decode = DecodeSide(peer_setup, pull_setup, eager=spec.role == "decode")

    def execute(self, command: TransferCommand) -> None:
        """Take a command of the scheduler; what comes of it shows as events."""
        match command:
            case StartPull() | CancelPull():
                self._decode.execute(command)
            case _:
                self._prefill.execute(command)

    def update_registry(self, entries: Sequence[Entry]) -> None:
        """Take in a new registry: peers come, go and restart."""
        self._decode.update_registry(entries)

    def turn(self) -> list[TransferEvent]:
        """Receive what has arrived, do what is due, and return what has happened."""
        # Answers first: others wait for them, while READs of this rank move by themselves.
        self._events += self._prefill.turn()
        self._decode.turn()
        events = self._events[:]
        # Cleared in place: pulls hold the ``append`` of this very list.
        self._events.clear()
        return events

    def register(self, poller: zmq.Poller) -> None:
        """Add the sockets of the decode side; that of the prefill side is the thread's."""
        self._decode.register(poller)

    def sleep_s(self, longest_s: float) -> float:
        """Return how long nothing is due, messages aside; at most ``longest_s``."""
        now = self._setup.clock()
        due_at = [self._prefill.next_deadline_at(), self._decode.next_deadline_at()]
        polled_since_at = latest((self._prefill.polling_since_at, self._decode.polling_since_at))
        if polled_since_at is not None:
            # READs and checksums on a device have no socket that could wake the thread.
            due_at.append(now + min(LONGEST_READ_SLEEP_S, SLEEP_SHARE * (now - polled_since_at)))
        next_at = earliest(due_at)
        return longest_s if next_at is None else min(longest_s, max(0.0, next_at - now))

    @property
    def is_idle(self) -> bool:
        """Return whether there is no lease, no pull of blocks and no write to a peer."""
        return self._prefill.is_idle and self._decode.is_idle

    @property
    def is_quiet(self) -> bool:
        """Return whether nothing reads or writes the memory, and nothing can begin to: idle, and no
        peer is left, not even for a READ.
        """
        return self.is_idle and not self._decode.has_peers

    @property
    def has_pending_reads(self) -> bool:
        """Return whether READs may still write to memory of this rank, also after ``close``."""
        return self._decode.has_pending_reads

    def is_connected_to(self, entries: Sequence[Entry]) -> bool:
        """Return whether every rank of the registry that shakes hands at once has done so, in
        either direction, or cannot.
        """
        spec = self._setup.spec
        if self._decode.is_connecting:
            return False
        if spec.role == "decode":
            return True
        # Decode ranks begin the handshake; this side knows those that have come.
        decode_ranks = {
            (entry.name, entry.incarnation)
            for entry in entries
            if entry.kind == "rank"
            and entry.role == "decode"
            and entry.engine != spec.name
            and entry.state == "ready"
        }
        return decode_ranks <= self._prefill.known_ranks

    def let_peers_go(self) -> None:
        """Lose all peers and take no new ones: the memory is about to go."""
        self._decode.let_peers_go()

    def take_peers_back(self, entries: Sequence[Entry]) -> None:
        """Connect again: the memory stays after all."""
        self._decode.take_peers_back(entries)

    def close(self) -> None:
        """Let go of peers and memory. READs that are pending are abandoned: the process is about to
        exit.
        """
        # Peers first: their connections belong to a connector that is open.
        self._decode.close()
        self._setup.connector.close()


def _open(connector: Connector, memory: RankMemory) -> LocalMemory:
    scratch = memory.source.zeros(scratch_bytes(memory.kv_cache.device))
    # Peers read the pattern to prove the path. It follows from the agent's name, so that memory of
    # another rank, or of an earlier incarnation, is not mistaken for it.
    write_pattern(scratch, connector.agent_name)
    local = LocalMemory(memory.kv_cache, scratch, memory.layout, memory.source)
    connector.open(local)
    return local
