"""A question for a lease, or its answer, gets lost with a connection that breaks unnoticed: real
transfer threads, sockets and a relay.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Literal

import pytest

from pdlaunch.protocol.control import Address, PairReady
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.transfer.pull import REPEAT_S
from tests.transfer.fakes import Fabric
from tests.transfer.test_thread import TIMEOUT_S, Rank, begin_pull

Way = Literal["question", "answer"]


class Relay:
    """Between a reader and a holder, as the network between two hosts."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._holder = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.swallows: Way | None = None
        self.swallowed = threading.Event()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self) -> None:
        """Both ends lose the connection."""
        self.swallows = None
        ended, self._open = self._open, []
        for end in ended:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.lose()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                reader, _ = self._listener.accept()
                holder = socket.create_connection(self._holder)
                self._open += [reader, holder]
                for ends in ((reader, holder, "question"), (holder, reader, "answer")):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()
                self.connections.put(None)

    def _pass_on(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        with contextlib.suppress(OSError), source:
            while content := source.recv(65536):
                if way == self.swallows:
                    self.swallowed.set()
                else:
                    sink.sendall(content)


@pytest.mark.parametrize("lost", ["question", "answer"])
def test_what_was_lost_is_asked_again(context: SecureContext, lost: Way) -> None:
    fabric, now = Fabric(), [time.monotonic()]
    holder = Rank(context, "prefill", fabric)
    reader = Rank(context, "decode", fabric, clock=lambda: now[0])
    relay = Relay(holder.transfer.endpoint)
    entries = [holder.entry(address=Address(side_channel=relay.endpoint)), reader.entry()]
    try:
        reader.transfer.update_registry(entries)
        assert isinstance(reader.reports.get(timeout=TIMEOUT_S), PairReady)
        relay.connections.get(timeout=TIMEOUT_S)
        relay.swallows = lost
        begin_pull(holder, reader, "r")
        assert relay.swallowed.wait(TIMEOUT_S)
        relay.lose()
        # ZMQ makes a new connection only when it knows of the old one's end: what is sent from now
        # on goes there.
        relay.connections.get(timeout=TIMEOUT_S)
        assert reader.transfer.take_events() == []
        now[0] += REPEAT_S
        reader.transfer.update_registry(entries)
        (finished,) = reader.events()
        assert finished.ok
    finally:
        holder.close()
        reader.close()
        relay.close()
