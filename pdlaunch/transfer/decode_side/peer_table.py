"""Keeps the peers of this rank equal to the registry."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from pdlaunch.errors import HandshakeError, TransferError
from pdlaunch.protocol.control import Entry, PairFailed
from pdlaunch.protocol.ids import EngineId
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.head_mapping import SourceRank
from pdlaunch.transfer.decode_side.links import PeerAddress, PeerSetup
from pdlaunch.transfer.decode_side.peer import Peer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerTable:
    """Keeps peers by name. A new incarnation is a new peer; the old one is kept while a READ may
    write.
    """

    setup: PeerSetup
    eager: bool
    """Shake hands with every prefill rank as soon as the registry shows it, not at the first
    pull.
    """
    peers: dict[str, Peer]
    """The ranks as the registry shows them."""
    gone: list[Peer]
    """Lost, with READs that are pending."""

    def update(self, entries: Iterable[Entry]) -> None:
        """Take in a new registry."""
        entries = list(entries)
        ranks = [
            entry
            for entry in entries
            if entry.kind == "rank" and entry.engine != self.setup.identity.engine
        ]
        leaders = {entry.engine: entry for entry in ranks if entry.tp_rank == 0 and entry.engine_id}
        addresses: dict[str, PeerAddress] = {}
        wanted: set[str] = set()
        for entry in ranks:
            # Rank 0's engine_id counts: others are compared with it. A rank that sleeps has no
            # memory, and one that has just started no side channel.
            leader = leaders.get(entry.engine)
            if (
                leader is None
                or not entry.engine_id
                or not entry.address.side_channel
                or entry.state == "sleeping"
            ):
                continue
            if entry.engine_id != leader.engine_id:
                self._report_disagreement(entry, leader)
                continue
            addresses[entry.name] = _address_of(entry)
            if self.eager and entry.role == "prefill":
                wanted.add(entry.name)
        self._replace(addresses)
        for name in wanted:
            self.peers[name].want()

    def lose_all(self, reason: str) -> None:
        """Lose every peer, until the next update."""
        for peer in self.all():
            peer.lose(reason)
        self.gone.extend(self.peers.values())
        self.peers.clear()

    def all(self) -> list[Peer]:
        """Return the peers in the registry, and those that have left it and are still kept."""
        return [*self.peers.values(), *self.gone]

    def advance(self) -> None:
        """Let every peer do what is due."""
        for peer in self.all():
            peer.advance()
        self.gone[:] = [peer for peer in self.gone if not peer.closed]

    def sources_of(self, engine_id: EngineId) -> list[tuple[SourceRank, Peer]]:
        """Return the ranks of an engine that this rank pulls from, and want them from now on.

        Raises TransferError when the engine or one of these ranks is not in the registry, or does
        not fit.
        """
        ranks = {
            peer.address.identity.tp_rank: peer
            for peer in self.peers.values()
            if peer.address.identity.engine_id == engine_id
        }
        if not ranks:
            raise TransferError(f"no engine with engine_id {engine_id} is in the registry")
        sources = self.setup.sources(next(iter(ranks.values())).address.identity.tp_size)
        missing = [source.tp_rank for source in sources if source.tp_rank not in ranks]
        if missing:
            raise TransferError(
                f"tp_rank {missing[0]} of engine_id {engine_id} is not in the registry"
            )
        for source in sources:
            ranks[source.tp_rank].want()
        return [(source, ranks[source.tp_rank]) for source in sources]

    def _replace(self, addresses: dict[str, PeerAddress]) -> None:
        for name, peer in list(self.peers.items()):
            # Gone, or there in another incarnation, whose PeerAddress differs.
            if addresses.get(name) != peer.address:
                reason = f"incarnation {peer.address.identity.incarnation} of {name} is gone"
                logger.info("%s", reason)
                peer.lose(reason)
                self.gone.append(self.peers.pop(name))
        for name, address in addresses.items():
            if name not in self.peers:
                self.peers[name] = Peer(address, self.setup)

    def _report_disagreement(self, entry: Entry, leader: Entry) -> None:
        """Report that ranks of one TP group carry different engine_ids, which is a fault except for
        a moment while an engine restarts.
        """
        error = HandshakeError(
            f"engine_id: {leader.name} at {leader.address.side_channel} has {leader.engine_id}, "
            f"{entry.name} at {entry.address.side_channel} has {entry.engine_id}"
        )
        logger.error("%s", error)
        fatal = entry.incarnation == leader.incarnation
        local = self.setup.identity.name
        self.setup.report(PairFailed(local=local, peer=entry.name, error=str(error), fatal=fatal))


def new_peer_table(setup: PeerSetup, *, eager: bool) -> PeerTable:
    """Return a table without peers."""
    return PeerTable(setup, eager, {}, [])


def _address_of(entry: Entry) -> PeerAddress:
    identity = RankIdentity(
        name=entry.name,
        engine=entry.engine,
        engine_id=entry.engine_id,
        incarnation=entry.incarnation,
        tp_rank=entry.tp_rank,
        tp_size=entry.tp_size,
    )
    return PeerAddress(identity, entry.address.side_channel)
