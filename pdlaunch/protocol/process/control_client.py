"""Connects a child process to the control channel, and beats its heart there."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable

import zmq

from pdlaunch.protocol.control import (
    Alive,
    FromSupervisor,
    ToSupervisor,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.sockets import SecureContext


class ControlClient:
    """Sends to the supervisor from any thread, and calls ``on_message`` in its own thread for what
    comes back.

    An event loop passes ``lambda message: loop.call_soon_threadsafe(handle, message)``.
    """

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        name: str,
        on_message: Callable[[FromSupervisor], None],
    ) -> None:
        self._context = context
        self._on_message = on_message
        self._outbox: queue.SimpleQueue[ToSupervisor | None] = queue.SimpleQueue()
        self._wake, self._woken = context.pair("control-wake")
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(endpoint, name), name="control", daemon=True
        )
        self._thread.start()

    def send(self, message: ToSupervisor) -> None:
        """Queue a message; never blocks."""
        self._put(message)

    def close(self) -> None:
        """Send what is queued and stop; at most two seconds."""
        # Behind all that is queued, so that a last Failed still leaves.
        self._put(None)
        self._thread.join(timeout=2)

    def _put(self, message: ToSupervisor | None) -> None:
        self._outbox.put(message)
        # A full pipe is a wake that waits already; after the end of the thread nobody needs one.
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake.send(b"", zmq.NOBLOCK)

    def _run(self, endpoint: str, name: str) -> None:
        socket = self._context.connect(zmq.DEALER, endpoint, identity=name.encode())
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._woken in ready:
                    self._woken.recv()
                    if not self._send_queued(socket):
                        return
                if socket in ready:
                    self._on_message(from_supervisor.decode(socket.recv()))
        except zmq.ContextTerminated:
            return
        finally:
            socket.close()

    def _send_queued(self, socket: zmq.Socket[bytes]) -> bool:
        while not self._outbox.empty():
            message = self._outbox.get()
            if message is None:
                return False
            socket.send(to_supervisor.encode(message))
        return True


class Heartbeat:
    """Says Alive every ``interval_s``, never when that is 0."""

    def __init__(
        self,
        send: Callable[[Alive], None],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._interval_s = interval_s
        self._clock = clock
        self._due_at = clock()

    def beat(self) -> None:
        """Call it with every turn of a loop."""
        now_at = self._clock()
        if self._interval_s and now_at >= self._due_at:
            self._due_at = now_at + self._interval_s
            self._send(Alive())

    async def run(self) -> None:
        """Beat with the event loop, until cancelled."""
        while self._interval_s:
            self.beat()
            await asyncio.sleep(self._interval_s)
