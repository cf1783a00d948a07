"""The transfer worker of one rank: one thread that owns the connector and the side channel.

The step loop hands it ``TransferCommand``s and fetches ``TransferEvent``s; it never waits for a peer. The thread sleeps in
``poll`` until a socket, a command or a deadline has something for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.errors import TransferError
from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from pdlaunch.transfer.connector import Connector
from pdlaunch.transfer.handshake import RankIdentity
from pdlaunch.transfer.loop import RankMemory, TransferLoop
from pdlaunch.transfer.side_channel import HolderSocket
from pdlaunch.transfer.stats import TransferStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _NewRegistry:
    entries: Sequence[Entry]


class _Stop:
    """Tells the thread to end."""


_Item = Sequence[TransferCommand] | _NewRegistry | _Stop


class TransferWorker:
    """Executes the transfer commands of one rank. All methods may be called from any thread and none but ``close`` waits."""

    def __init__(
        self,
        *,
        context: SecureContext,
        spec: EngineSpec,
        name: str,
        tp_rank: int,
        engine_id: str,
        incarnation: int,
        layout: KVCacheLayout,
        kv_cache: torch.Tensor,
        model_digest: str,
        total_kv_heads: int,
        first_kv_head: int,
        connector: Connector,
        wake: Callable[[], None],
        report: Callable[[ToSupervisor], None],
        clock: Callable[[], float] = time.monotonic,
        host: str = "127.0.0.1",
    ) -> None:
        """Binds the side channel and starts the thread, which opens the connector.

        ``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous; must outlive the process' last
        READ. ``wake`` is called from the thread when events are there, or when the thread has died; ``report`` for what the
        supervisor must know of this rank's pairs. ``connector_environment`` must be applied when ``connector`` needs it.
        """
        identity = RankIdentity(name, spec.name, engine_id, incarnation, tp_rank, spec.tensor_parallel_size)
        memory = RankMemory(kv_cache, layout, model_digest, total_kv_heads, first_kv_head)
        assert kv_cache.is_contiguous()
        assert tuple(kv_cache.shape[1:]) == layout.block_shape()
        self._wake_engine = wake
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self._stats = TransferStats()
        self._error: Exception | None = None
        self._started = threading.Event()
        self._wake_lock = threading.Lock()
        self._wake, self._woken = context.pair(f"transfer-wake/{name}#{incarnation}")
        self._socket = HolderSocket(context, f"tcp://{host}:0")
        self._thread = threading.Thread(
            target=self._run,
            kwargs={
                "context": context,
                "holder_socket": self._socket,
                "spec": spec,
                "identity": identity,
                "memory": memory,
                "connector": connector,
                "report": report,
                "clock": clock,
            },
            name="transfer",
            daemon=True,
        )
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """Of the side channel: ``tcp://127.0.0.1:43210``."""
        return self._socket.endpoint

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        """Queue commands; they are executed in their order."""
        if commands:
            self._put(commands)

    def update_registry(self, entries: Sequence[Entry]) -> None:
        """The registry has changed: peers come, go and restart."""
        self._put(_NewRegistry(entries))

    def take_events(self) -> list[TransferEvent]:
        """What has happened since the last call. Raises TransferError when the thread has died: the rank cannot go on."""
        if self._error is not None:
            raise TransferError(f"the transfer thread has died: {self._error}") from self._error
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def stats(self) -> dict[str, Any]:
        """Totals since the start, by field of ``EngineStats``."""
        return asdict(self._stats)

    def wait_started(self, timeout_s: float) -> None:
        """Wait until the connector is open; peers are answered from then on. Raises TransferError."""
        if not self._started.wait(timeout_s):
            raise TransferError(f"the connector did not start within {timeout_s:g} s")
        if self._error is not None:
            raise TransferError(f"the connector cannot start: {self._error}") from self._error

    def close(self, timeout_s: float) -> None:
        """End the thread and let go of memory and sockets; gives up after ``timeout_s``. The process then leaves by os._exit."""
        self._put(_Stop())
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the transfer thread did not end within %g s", timeout_s)

    def _put(self, item: _Item) -> None:
        self._inbox.put(item)
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake.send(b"", zmq.NOBLOCK)

    def _run(self, **setup: Any) -> None:
        """The thread. Whatever kills it is shown by ``take_events``."""
        try:
            loop = TransferLoop(**setup)
            self._started.set()
            try:
                self._turn_until_stopped(loop)
            finally:
                loop.close()
        except zmq.ContextTerminated:
            return
        except Exception as error:
            logger.exception("the transfer thread has died")
            self._error = error
            self._wake_engine()
        finally:
            self._started.set()
            self._close_sockets()

    def _turn_until_stopped(self, loop: TransferLoop) -> None:
        while self._execute_inbox(loop):
            self._publish(loop.turn())
            poller = zmq.Poller()
            poller.register(self._woken, zmq.POLLIN)
            loop.register(poller)
            # Rounded up: waking before a deadline would only mean to look again.
            if self._woken in dict(poller.poll(math.ceil(loop.sleep_s() * 1000))):
                self._drain_wakes()

    def _execute_inbox(self, loop: TransferLoop) -> bool:
        """Returns False when told to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                match self._inbox.get_nowait():
                    case _Stop():
                        return False
                    case _NewRegistry(entries):
                        loop.update_registry(entries)
                    case commands:
                        for command in commands:
                            loop.execute(command)
        return True

    def _publish(self, events: list[TransferEvent]) -> None:
        if not events:
            return
        self._stats = self._stats.counting(events)
        for event in events:
            self._events.put(event)
        self._wake_engine()

    def _drain_wakes(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._woken.recv(zmq.NOBLOCK)

    def _close_sockets(self) -> None:
        self._socket.close()
        with self._wake_lock:
            self._woken.close()
            self._wake.close()
