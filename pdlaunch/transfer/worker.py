"""The transfer worker of one rank: one thread that owns the connector and the side channel.

The step loop hands it ``TransferCommand``s and fetches ``TransferEvent``s; it never waits for a
peer. The thread sleeps in ``poll`` until a socket, a command or a deadline has something for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.errors import TransferError
from pdlaunch.kvcache.groups import KVCacheLayout
from pdlaunch.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.platform.timer_slack import sleep_precisely
from pdlaunch.protocol.control import Entry, ToSupervisor
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from pdlaunch.transfer.asleep import AsleepLoop
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.side_channel import PrefillSocket
from pdlaunch.transfer.connectors.connector import Connector
from pdlaunch.transfer.loop import LONGEST_SLEEP_S, RankMemory, TransferLoop

logger = logging.getLogger(__name__)

CONFIRMATION_S = 5.0
"""For the transfer thread to answer once its deadline has passed."""
AWAKE_S = 0.005
"""After a pull has begun to read."""
SHORTEST_SLEEP_S = 0.0001
"""Shorter ones are left out: READs of up to 3 ms are waited for awake."""
SUSPENSION_SLEEP_S = 0.01
"""Between two looks at whether READs that nobody waits for have ended."""


@dataclass(frozen=True, slots=True)
class _NewRegistry:
    entries: Sequence[Entry]


class _Stop:
    """Tells the thread to end."""


@dataclass(frozen=True, slots=True)
class _Suspend:
    """Let go of the memory; ``done`` when that is so, or given up at ``deadline_s``."""

    deadline_s: float
    done: Future[str]
    """Its result says why it failed; empty when it did not."""


@dataclass(frozen=True, slots=True)
class _Resume:
    """Open the connector again."""

    done: Future[str]
    """As that of ``_Suspend``."""


_Item = Sequence[TransferCommand] | _NewRegistry | _Stop | _Suspend | _Resume
_Loop = TransferLoop | AsleepLoop


class TransferWorker:
    """Executes the transfer commands of one rank. All methods may be called from any thread and
    none but ``close`` waits.
    """

    def __init__(
        self,
        *,
        context: SecureContext,
        spec: EngineSpec,
        name: str,
        tp_rank: int,
        engine_id: EngineId,
        incarnation: int,
        layout: KVCacheLayout,
        kv_cache: torch.Tensor,
        model_digest: str,
        total_kv_heads: int,
        first_kv_head: int,
        connector: Connector,
        source: KVMemory | None = None,
        wake: Callable[[], None],
        report: Callable[[ToSupervisor], None],
        clock: Callable[[], float] = time.monotonic,
        host: str = "127.0.0.1",
    ) -> None:
        """Binds the side channel and starts the thread, which opens the connector.

        ``kv_cache``: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], contiguous;
        must outlive the process' last READ. ``source``: what it was allocated from; None: memory
        that peers cannot map. ``wake`` is called from the thread when events are there, or when the
        thread has died; ``report`` for what the supervisor must know of this rank's pairs.
        ``connector_environment`` must be applied when ``connector`` needs it.
        """
        identity = RankIdentity(
            name, spec.name, engine_id, incarnation, tp_rank, spec.tensor_parallel_size
        )
        memory = RankMemory(
            kv_cache,
            layout,
            model_digest,
            total_kv_heads,
            first_kv_head,
            source or PrivateKVMemory(kv_cache.device),
        )
        assert kv_cache.is_contiguous()
        assert tuple(kv_cache.shape[1:]) == layout.block_shape()
        self._wake_engine = wake
        self._connector = connector
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self._error: str | None = None
        """Why the thread has died. Its exception is not kept: the traceback would keep the KV cache
        alive.
        """
        self._started = threading.Event()
        self._clock = clock
        self._suspension: _Suspend | None = None
        self._connected = True
        self.awake_until_s = 0.0
        """Clock time until which the end of a pull is likely to come at any moment; ``wake`` tells
        when that becomes later.
        """
        self.awaited_bytes = 0
        """What that pull reads."""
        self._wake_lock = threading.Lock()
        self._wake, self._woken = context.pair(f"transfer-wake/{name}#{incarnation}")
        self._socket = PrefillSocket(context, f"tcp://{host}:0")
        self._thread = threading.Thread(
            target=self._run,
            kwargs={
                "context": context,
                "prefill_socket": self._socket,
                "spec": spec,
                "identity": identity,
                "memory": memory,
                "connector": connector,
                "report": report,
                "alert": self._alert,
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
        """What has happened since the last call. Raises TransferError when the thread has died: the
        rank cannot go on.
        """
        if self._error is not None:
            raise TransferError(f"the transfer thread has died: {self._error}")
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def wait_started(self, timeout_s: float) -> None:
        """Wait until the connector is open; peers are answered from then on. Raises
        TransferError.
        """
        if not self._started.wait(timeout_s):
            raise TransferError(f"the connector did not start within {timeout_s:g} s")
        if self._error is not None:
            raise TransferError(f"the connector cannot start: {self._error}")

    def suspend(self, timeout_s: float) -> None:
        """Let peers and registered memory go; peers are told that this rank is asleep. Waits until
        nothing can use the memory.

        Raises TransferError when that does not come true within ``timeout_s``; then everything is
        as before.
        """
        done: Future[str] = Future()
        self._put(_Suspend(self._clock() + timeout_s, done))
        self._await(done, timeout_s + CONFIRMATION_S)

    def resume(self, timeout_s: float) -> None:
        """Register the memory anew, and shake hands with the peers of the registry again; see
        ``connected``.

        Raises TransferError when the connector does not open.
        """
        done: Future[str] = Future()
        self._put(_Resume(done))
        self._await(done, timeout_s)

    @property
    def connected(self) -> bool:
        """Since the last ``resume`` all peers of the registry have shaken hands again; ``wake``
        tells when that comes true.
        """
        return self._connected

    def wait_unmapped(self, timeout_s: float) -> bool:
        """While suspended: wait until no peer maps this rank's memory any more; False when that
        takes longer.
        """
        return self._connector.wait_unmapped(timeout_s)

    def close(self, timeout_s: float) -> None:
        """End the thread and let go of memory and sockets; gives up after ``timeout_s``. The
        process then leaves by os._exit.
        """
        self._put(_Stop())
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the transfer thread did not end within %g s", timeout_s)

    def _await(self, done: Future[str], timeout_s: float) -> None:
        try:
            error = done.result(timeout_s)
        except TimeoutError:
            raise TransferError(
                f"the transfer thread did not answer within {timeout_s:g} s"
            ) from None
        if error:
            raise TransferError(error)

    def _put(self, item: _Item) -> None:
        self._inbox.put(item)
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake.send(b"", zmq.NOBLOCK)

    def _run(self, **setup: Any) -> None:
        """The thread. Whatever kills it is shown by ``take_events``."""
        sleep_precisely()
        try:
            self._loop: _Loop = TransferLoop(**setup)
            self._started.set()
            try:
                self._turn_until_stopped(setup)
            finally:
                self._close_loop()
        except zmq.ContextTerminated:
            return
        except Exception as error:
            logger.exception("the transfer thread has died")
            self._error = str(error)
            self._wake_engine()
        finally:
            self._started.set()
            self._close_sockets()

    def _close_loop(self) -> None:
        self._loop.close()
        if not self._loop.reads_pending:
            del self._loop  # which refers to the KV cache, and to this worker; a READ that is pending may still write to it

    def _turn_until_stopped(self, setup: dict[str, Any]) -> None:
        while self._execute_inbox(setup):
            self._publish(self._loop.turn())
            self._advance_suspension(setup)
            self._look_for_peers()
            sleep_s = min(
                self._loop.sleep_s(),
                LONGEST_SLEEP_S if self._suspension is None else SUSPENSION_SLEEP_S,
            )
            if sleep_s < SHORTEST_SLEEP_S:
                time.sleep(0)  # others may want the interpreter
                continue
            poller = zmq.Poller()
            poller.register(self._woken, zmq.POLLIN)
            self._loop.register(poller)
            if self._woken in dict(_poll(poller, sleep_s)):
                self._drain_wakes()

    def _execute_inbox(self, setup: dict[str, Any]) -> bool:
        """Returns False when told to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                match self._inbox.get_nowait():
                    case _Stop():
                        return False
                    case _NewRegistry(entries):
                        self._loop.update_registry(entries)
                    case _Suspend() as suspension:
                        self._suspension = suspension
                    case _Resume(done):
                        self._resume(done, setup)
                    case commands:
                        for command in commands:
                            self._loop.execute(command)
        return True

    def _advance_suspension(self, setup: dict[str, Any]) -> None:
        """Let the memory go once nothing uses it; at the deadline stay as before."""
        suspension, loop = self._suspension, self._loop
        if suspension is None:
            return
        if loop.idle:
            loop.let_peers_go()
        if loop.quiet:
            loop.close()
            self._loop = AsleepLoop(setup["prefill_socket"], setup["identity"], loop.entries)
            self._suspension = None
            suspension.done.set_result("")
        elif self._clock() >= suspension.deadline_s:
            loop.stay()
            self._suspension = None
            suspension.done.set_result("a transfer of KV blocks of this rank has not ended")

    def _look_for_peers(self) -> None:
        if not self._connected and self._loop.connected:
            self._connected = True
            self._wake_engine()

    def _resume(self, done: Future[str], setup: dict[str, Any]) -> None:
        entries = self._loop.entries
        if isinstance(self._loop, AsleepLoop):
            try:
                self._loop = TransferLoop(**setup)
            except TransferError as error:
                done.set_result(str(error))
                return
            self._loop.update_registry(entries)
            self._connected = False
        done.set_result("")

    def _alert(self, num_bytes: int) -> None:
        """Somebody who sleeps would notice the end of a short pull late."""
        self.awaited_bytes, self.awake_until_s = num_bytes, self._clock() + AWAKE_S
        self._wake_engine()

    def _publish(self, events: list[TransferEvent]) -> None:
        if not events:
            return
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


def _poll(poller: zmq.Poller, timeout_s: float) -> list[tuple[Any, int]]:
    """What is ready within ``timeout_s``; less than a millisecond, which ``poll`` does not know, is
    slept through.
    """
    if timeout_s < 0.001:
        time.sleep(timeout_s)
        return poller.poll(0)
    # Rounded up: waking before a deadline would only mean to look again.
    return poller.poll(math.ceil(timeout_s * 1000))
