"""Shakes hands with prefill ranks and pulls the blocks of prompts from them.

Peers come before pulls in everything: a pull can only ask over a connection that its peer has made,
and what a peer receives is what lets its pulls go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from pdlaunch.protocol.control import Entry
from pdlaunch.protocol.transfer import CancelPull, DecodeCommand, StartPull
from pdlaunch.transfer.decode_side.links import PeerSetup, PullSetup
from pdlaunch.transfer.decode_side.peer_table import new_peer_table
from pdlaunch.transfer.decode_side.pull import PullTable
from pdlaunch.transfer.instants import earliest, latest


class DecodeSide:
    """Keeps the peers and the pulls of one rank. The transfer thread owns it.

    Pulls report their ends through ``pull_setup.emit``.
    """

    def __init__(self, peer_setup: PeerSetup, pull_setup: PullSetup, *, eager: bool) -> None:
        """``eager``: shake hands with every prefill rank as soon as the registry shows it, not at
        the first pull.
        """
        self._peers = new_peer_table(peer_setup, eager=eager)
        self._pulls = PullTable(pull_setup, self._peers)
        self._lets_peers_go = False

    def execute(self, command: DecodeCommand) -> None:
        """Take a command of the scheduler; what comes of it shows as events."""
        match command:
            case StartPull():
                self._pulls.start(command)
            case CancelPull():
                self._pulls.cancel(command)

    def update_registry(self, entries: Sequence[Entry]) -> None:
        """Take in a new registry, unless peers have been let go: they come, go and restart."""
        if not self._lets_peers_go:
            self._peers.update(entries)

    def turn(self) -> None:
        """Receive answers, then let every pull do what can be done now."""
        self._peers.advance()
        self._pulls.advance()

    def register(self, poller: zmq.Poller) -> None:
        """Add the sockets of all peers."""
        for peer in self._peers.all():
            if peer.channel is not None:
                poller.register(peer.channel.socket, zmq.POLLIN)

    def next_deadline_at(self) -> float | None:
        """Return when ``turn`` has something to do, messages, READs and checksums aside."""
        return earliest(
            (
                self._pulls.next_deadline_at(),
                *(peer.next_deadline_at() for peer in self._peers.all()),
            )
        )

    @property
    def polling_since_at(self) -> float | None:
        """Return the instant at which the latest of the unfinished READs and checksums began."""
        return latest(
            (
                self._pulls.hashing_since_at,
                *(peer.reading_since_at for peer in self._peers.all()),
            )
        )

    @property
    def is_idle(self) -> bool:
        """Return whether no block of this rank belongs to a pull."""
        return not self._pulls.hold_blocks

    @property
    def has_peers(self) -> bool:
        """Return whether a peer is left, be it for a READ that nobody waits for."""
        return bool(self._peers.all())

    @property
    def has_pending_reads(self) -> bool:
        """Return whether READs may still write to memory of this rank, also after ``close``."""
        return any(peer.reading_since_at is not None for peer in self._peers.all())

    @property
    def is_connecting(self) -> bool:
        """Return whether a peer of the registry is needed and may still become ready."""
        return any(peer.connecting for peer in self._peers.peers.values())

    def let_peers_go(self) -> None:
        """Lose all peers and take no new ones: the memory is about to go."""
        self._lets_peers_go = True
        self._peers.lose_all("this engine falls asleep")

    def take_peers_back(self, entries: Sequence[Entry]) -> None:
        """Connect again: the memory stays after all."""
        self._lets_peers_go = False
        self._peers.update(entries)

    def close(self) -> None:
        """Lose all peers. READs that are pending are abandoned: the process is about to exit."""
        for peer in self._peers.all():
            peer.lose("this rank is closing")
