"""One decode rank and its prefill ranks in one process: real leases, peers and pulls with a fake
connector and fake channels. A holder is a prefill rank, a puller a decode rank.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.protocol.control import Entry, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import (
    Compatibility,
    HandshakeReply,
    ToDecodeSide,
    ToPrefillSide,
)
from pdlaunch.protocol.transfer import GrantLease, LeaseEnded, PullFinished, TransferEvent
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES, SCRATCH_BYTES, write_pattern
from pdlaunch.transfer.handshake import DecodeSetup, RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.leases import PrefillSide
from pdlaunch.transfer.peers import PeerTable
from pdlaunch.transfer.pull import PullTable
from pdlaunch.transfer.regions import KVRegions, native_regions
from tests.clock import FakeClock
from tests.transfer.fakes import (
    Fabric,
    FakeChannel,
    FakeConnector,
    entry_of,
    layout_of,
    random_cache,
    remote_of,
    spec_of,
)


class Holder(PrefillSide):
    """A prefill side that answers over fake channels in place of sockets."""

    def __init__(
        self, card: HandshakeReply, hasher: KVHasher | None, connector: FakeConnector, clock: Any
    ) -> None:
        super().__init__(card, hasher, connector, lambda channel, reply: channel.take(reply), clock)
        self.ended: list[LeaseEnded] = []
        self.desk = FakeChannel(lambda *_: None)  # receives the answers to questions of tests

    def hear(self, channel: Any, *messages: ToPrefillSide) -> None:
        self.ended += self.turn((channel, message) for message in messages)

    def ask(self, *messages: ToPrefillSide) -> list[ToDecodeSide]:
        """Process a test's messages in one turn; return the answers to them."""
        self.hear(self.desk, *messages)
        return self.desk.receive()

    def grant(self, command: GrantLease) -> None:
        """Grant a lease, and compute its checksums at once, as the thread does by its next turn."""
        self.execute(command)
        self.hash_leases()


class HolderRank:
    """A prefill rank without thread and sockets."""

    def __init__(
        self,
        clock: FakeClock,
        fabric: Fabric,
        *,
        incarnation: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        new_hasher: Callable[[KVRegions], KVHasher] = KVHasher,
        new_connector: Callable[[str, Fabric], FakeConnector] = FakeConnector,
        **spec: Any,
    ) -> None:
        self.layout = layout_of(3 // tp_size, block_size=spec.get("block_size", 16))
        self.kv_cache = random_cache(self.layout, 16, seed=incarnation + tp_rank)
        name = f"prefill-0/rank-{tp_rank}"
        self.identity = RankIdentity(
            name, "prefill-0", f"{incarnation}" * 32, incarnation, tp_rank, tp_size
        )
        connector = new_connector(f"{name}#{incarnation}", fabric)
        memory = local_memory(connector.agent_name, self.kv_cache, self.layout)
        connector.open(memory)
        self.card = card_of(connector, memory, self.identity, compatibility(self.layout, **spec))
        hasher = (
            new_hasher(native_regions(self.kv_cache, self.layout))
            if spec.get("verify", True)
            else None
        )
        self.holder = Holder(self.card, hasher, connector, clock)
        self.channels: list[FakeChannel] = []

    @property
    def channel(self) -> FakeChannel:
        """The newest connection to this rank."""
        return self.channels[-1]

    def entry(self) -> Entry:
        identity = self.identity
        endpoint = f"fake://{identity.incarnation + 10 * identity.tp_rank}"
        fields = {"incarnation": identity.incarnation, "tp_size": identity.tp_size}
        fields |= {"tp_rank": identity.tp_rank}
        return entry_of(identity.engine, "prefill", identity.engine_id, endpoint, **fields)

    def remote(self, lease_id: str) -> RemoteKV:
        return remote_of(self.identity.engine_id, lease_id)

    def ended(self) -> list[LeaseEnded]:
        self.holder.hear(self.holder.desk)
        ended, self.holder.ended = self.holder.ended, []
        return ended

    def sent(self, kind: type) -> list[Any]:
        sent = [message for channel in self.channels for message in channel.sent]
        return [message for message in sent if isinstance(message, kind)]


def card_of(
    connector: Connector, memory: LocalMemory, rank: RankIdentity, compatibility: Compatibility
) -> HandshakeReply:
    """A rank's answer to a handshake."""
    return HandshakeReply(
        call_id=0,
        engine_id=rank.engine_id,
        rank_name=rank.name,
        incarnation=rank.incarnation,
        tp_rank=rank.tp_rank,
        tp_size=rank.tp_size,
        compatibility=compatibility,
        geometry=geometry_of(memory, rank.tp_rank),
        agent_name=connector.agent_name,
        agent_metadata=connector.agent_metadata(),
    )


def compatibility(layout: KVCacheLayout, role: str = "prefill", **spec: Any) -> Compatibility:
    return compatibility_of(
        spec_of(role, **spec),
        layout,
        torch.float32,
        model_digest="m",
        total_kv_heads=3,
        connector="fake",
    )


def local_memory(agent_name: str, kv_cache: torch.Tensor, layout: KVCacheLayout) -> LocalMemory:
    """The rows of the scratch, [16, PATTERN_BYTES], share their memory: all are equal and never
    written.
    """
    row = torch.empty(PATTERN_BYTES, dtype=torch.uint8)
    write_pattern(row, agent_name)
    scratch = row.expand(SCRATCH_BYTES // PATTERN_BYTES, PATTERN_BYTES)
    return LocalMemory(native_regions(kv_cache, layout), scratch)


@dataclass
class World:
    """A puller rank, and the holder ranks that it can reach."""

    clock: FakeClock = field(default_factory=FakeClock)
    fabric: Fabric = field(default_factory=Fabric)
    holders: dict[str, HolderRank] = field(default_factory=dict)
    events: list[TransferEvent] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    eager: bool = True
    verify: bool = True
    new_connector: Callable[[str, Fabric], FakeConnector] = FakeConnector

    def __post_init__(self) -> None:
        layout = layout_of()
        self.kv_cache = random_cache(layout, 16, seed=99)
        self.connector = self.new_connector("decode-0/rank-0#1", self.fabric)
        memory = local_memory(self.connector.agent_name, self.kv_cache, layout)
        self.connector.open(memory)
        # A weak reference: peers that reference the world would be a cycle that keeps its tensors.
        weak = weakref.proxy(self)
        self.setup = DecodeSetup(
            identity=RankIdentity("decode-0/rank-0", "decode-0", "d" * 32, 1, 0, 1),
            compatibility=compatibility(layout, "decode", verify=self.verify),
            memory=memory,
            first_kv_head=0,
            connector=self.connector,
            hasher=KVHasher(native_regions(self.kv_cache, layout)) if self.verify else None,
            open_channel=lambda endpoint: weak.open_channel(endpoint),
            settings=spec_of("decode", handshake_timeout_s=5.0).kv_transfer,
            clock=self.clock,
            report=self.reports.append,
            emit=self.events.append,
        )
        self.peers = PeerTable(self.setup, eager=self.eager)
        self.pulls = PullTable(self.setup, self.peers)

    def pull_with(self, **settings: Any) -> None:
        changed = self.setup.settings.model_copy(update=settings)
        self.setup = replace(self.setup, settings=changed)
        self.pulls = PullTable(self.setup, self.peers)

    def close(self) -> None:
        self.peers.lose_all("the world is closed")

    def open_channel(self, endpoint: str) -> FakeChannel:
        holder = self.holders.get(endpoint)
        if holder is None:
            return FakeChannel(lambda *_: None)
        holder.channels.append(FakeChannel(holder.holder.hear))
        return holder.channel

    def add(self, **options: Any) -> HolderRank:
        options = {"verify": self.verify, "new_connector": self.new_connector} | options
        holder = HolderRank(self.clock, self.fabric, **options)
        self.holders[holder.entry().address.side_channel] = holder
        return holder

    def turn(self, times: int = 4) -> None:
        for _ in range(times):
            for holder in self.holders.values():
                holder.holder.hear(None)
            self.peers.advance()
            self.pulls.advance()

    def connect(self, **options: Any) -> HolderRank:
        (holder,) = self.connect_group(1, **options)
        return holder

    def connect_group(self, tp_size: int, **options: Any) -> list[HolderRank]:
        holders = [self.add(tp_rank=rank, tp_size=tp_size, **options) for rank in range(tp_size)]
        self.peers.update([holder.entry() for holder in holders])
        self.turn()
        assert [type(report) for report in self.reports[-tp_size:]] == [PairReady] * tp_size
        return holders

    def finished(self) -> PullFinished:
        event = self.events.pop(0)
        assert isinstance(event, PullFinished)
        return event
