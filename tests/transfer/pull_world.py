"""One decode rank and its prefill ranks in one process: real leases, peers and
pulls over a fake connector and fake channels.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.protocol.control import Address, Entry, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import HandshakeReply, ToDecodeSide, ToPrefillSide
from pdlaunch.protocol.transfer import (
    GrantLease,
    LeaseEnded,
    PullFinished,
    TransferEvent,
)
from pdlaunch.transfer.connectors.connector import LocalMemory
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES, SCRATCH_BYTES, write_pattern
from pdlaunch.transfer.handshake import DecodeSetup, RankIdentity, compatibility_of, geometry_of
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.leases import PrefillSide
from pdlaunch.transfer.peers import PeerTable
from pdlaunch.transfer.pull import PullTable
from tests.transfer.fakes import (
    Fabric,
    FakeChannel,
    FakeClock,
    FakeConnector,
    layout_of,
    random_cache,
    spec_of,
)


class Holder(PrefillSide):
    """Keeps its answers for whoever asks in this process."""

    def __init__(self, card: HandshakeReply, hasher: KVHasher | None, clock: FakeClock) -> None:
        answers: list[ToDecodeSide] = []
        self.answers = answers
        self.ended: list[LeaseEnded] = []
        super().__init__(card, hasher, lambda _, answer: answers.append(answer), clock)

    def ask(self, *messages: ToPrefillSide) -> list[ToDecodeSide]:
        """Take a turn, and return all answers that it brings."""
        self.ended += self.turn((b"reader", message) for message in messages)
        answers = self.answers[:]
        self.answers.clear()
        return answers

    def grant(self, command: GrantLease) -> None:
        """Have the checksums at once, as the transfer thread has them by its next turn."""
        self.execute(command)
        self.advance_checksums()

    def take_ended(self) -> list[LeaseEnded]:
        self.ask()
        ended, self.ended = self.ended, []
        return ended


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
        **spec: Any,
    ) -> None:
        self.layout = layout_of(3 // tp_size, block_size=spec.get("block_size", 16))
        self.kv_cache = random_cache(self.layout, 16, seed=incarnation + tp_rank)
        name = f"prefill-0/rank-{tp_rank}"
        self.identity = RankIdentity(
            name, "prefill-0", f"{incarnation}" * 32, incarnation, tp_rank, tp_size
        )
        connector = FakeConnector(f"{name}#{incarnation}", fabric)
        memory = local_memory(connector.agent_name, self.kv_cache, self.layout)
        connector.open(memory)
        compatibility = compatibility_of(
            spec_of(**spec),
            self.layout,
            torch.float32,
            model_digest="m",
            total_kv_heads=3,
            connector="fake",
        )
        self.card = HandshakeReply(
            call_id=0,
            engine_id=self.identity.engine_id,
            rank_name=name,
            incarnation=incarnation,
            tp_rank=tp_rank,
            tp_size=tp_size,
            compatibility=compatibility,
            geometry=geometry_of(memory, tp_rank),
            agent_name=connector.agent_name,
            agent_metadata=connector.agent_metadata(),
        )
        hasher = KVHasher(self.kv_cache, self.layout) if spec.get("verify", True) else None
        self.holder = Holder(self.card, hasher, clock)
        self.channels: list[FakeChannel] = []

    @property
    def channel(self) -> FakeChannel:
        """The newest connection to this rank."""
        return self.channels[-1]

    def entry(self) -> Entry:
        return Entry(
            name=self.identity.name,
            kind="rank",
            incarnation=self.identity.incarnation,
            engine=self.identity.engine,
            role="prefill",
            tp_rank=self.identity.tp_rank,
            tp_size=self.identity.tp_size,
            engine_id=self.identity.engine_id,
            address=Address(
                side_channel=f"fake://{self.identity.incarnation + 10 * self.identity.tp_rank}"
            ),
        )

    def remote(self, lease_id: str) -> RemoteKV:
        return RemoteKV(
            engine_id=self.identity.engine_id,
            lease_id=lease_id,
            host="h",
            port=1,
            block_ids=[],
            num_tokens=1,
        )

    def ended(self) -> list[LeaseEnded]:
        return self.holder.take_ended()

    def sent(self, kind: type) -> list[Any]:
        return [
            message
            for channel in self.channels
            for message in channel.sent
            if isinstance(message, kind)
        ]


def local_memory(agent_name: str, kv_cache: torch.Tensor, layout: KVCacheLayout) -> LocalMemory:
    """The rows of its scratch, [16, PATTERN_BYTES], share their memory: all are equal, and nobody
    writes to them.
    """
    row = torch.empty(PATTERN_BYTES, dtype=torch.uint8)
    write_pattern(row, agent_name)
    return LocalMemory(kv_cache, row.expand(SCRATCH_BYTES // PATTERN_BYTES, PATTERN_BYTES), layout)


@dataclass
class World:
    """One puller rank and the holders that it can reach."""

    clock: FakeClock = field(default_factory=FakeClock)
    fabric: Fabric = field(default_factory=Fabric)
    holders: dict[str, HolderRank] = field(default_factory=dict)
    events: list[TransferEvent] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    eager: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        layout = layout_of()
        self.kv_cache = random_cache(layout, 16, seed=99)
        self.connector = FakeConnector("decode-0/rank-0#1", self.fabric)
        self.connector.open(local_memory(self.connector.agent_name, self.kv_cache, layout))
        weak = weakref.proxy(
            self
        )  # peers that refer to the world would be a cycle, which keeps its tensors
        hasher = KVHasher(self.kv_cache, layout) if self.verify else None
        self.setup = DecodeSetup(
            identity=RankIdentity("decode-0/rank-0", "decode-0", "d" * 32, 1, 0, 1),
            compatibility=compatibility_of(
                spec_of("decode", verify=self.verify),
                layout,
                torch.float32,
                model_digest="m",
                total_kv_heads=3,
                connector="fake",
            ),
            head_bytes=layout.head_bytes,
            first_kv_head=0,
            connector=self.connector,
            hasher=hasher,
            open_channel=lambda endpoint: weak.open_channel(endpoint),
            handshake_timeout_s=5.0,
            clock=self.clock,
            report=self.reports.append,
            emit=self.events.append,
        )
        self.peers = PeerTable(self.setup, eager=self.eager)
        self.pulls = PullTable(self.setup, self.peers)

    def close(self) -> None:
        """Let go of what was asked and has no answer."""
        self.peers.lose_all("the world is closed")

    def open_channel(self, endpoint: str) -> FakeChannel:
        holder = self.holders.get(endpoint)
        if holder is None:
            return FakeChannel(lambda message: None)
        holder.channels.append(FakeChannel(holder.holder.answer))
        return holder.channel

    def add(self, **options: Any) -> HolderRank:
        holder = HolderRank(self.clock, self.fabric, verify=self.verify, **options)
        self.holders[holder.entry().address.side_channel] = holder
        return holder

    def turn(self, times: int = 4) -> None:
        for _ in range(times):
            self.peers.advance()
            self.pulls.advance()

    def connect(self, **options: Any) -> HolderRank:
        holder = self.add(**options)
        self.peers.update([holder.entry()])
        self.turn()
        assert isinstance(self.reports[-1], PairReady)
        return holder

    def connect_group(self, tp_size: int) -> list[HolderRank]:
        """All ranks of a holder with tensor parallelism."""
        holders = [self.add(tp_rank=tp_rank, tp_size=tp_size) for tp_rank in range(tp_size)]
        self.peers.update([holder.entry() for holder in holders])
        self.turn()
        assert [type(report) for report in self.reports[-tp_size:]] == [PairReady] * tp_size
        return holders

    def finished(self) -> PullFinished:
        event = self.events.pop(0)
        assert isinstance(event, PullFinished)
        return event
