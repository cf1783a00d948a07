"""Runs a rank process: one device's share of an engine.

``RankProcess.run`` starts the parts in the order in which they need each other: TP group, engine_id
(drawn by rank 0, broadcast over the group), model and KV cache, connector, addresses. Then it runs
a step loop of ``leader.py``.
"""

import contextlib
import gc
import logging
import os
import queue

import zmq

from pdlaunch.engine.leader import Follower, Leader, LeaderChannel, RankParts, ServerLink
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.engine.offload.planner import HostTier, OffloadPlanner
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol import control
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import (
    Bootstrap,
    ControlClient,
    Heartbeat,
    leave_ends_to_supervisor,
)
from pdlaunch.protocol.process.step_record import StepRecord
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.transfer.connectors.connector import NoConnector, new_connector
from pdlaunch.transfer.handshake import RankIdentity, draw_engine_id, native_setup
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.regions import native_regions
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

CONNECTOR_TIMEOUT_S = 60.0
MEETING_BYTES = 96  # engine_id, 32 digits, and a loopback endpoint
# On a CPU, limit of prompt tokens in a step that also decodes. A core computes 128 tokens of the
# demo model in 0.4 s: a full step of 512 would keep each stream waiting for 1.6 s.
CPU_TOKENS_BESIDE_STREAMS = 64


class RankProcess:
    """Owns all parts of one rank; ``run`` returns when the supervisor or rank 0 stops the rank."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self._spec = bootstrap.engine()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inbox: queue.SimpleQueue[control.FromSupervisor] = queue.SimpleQueue()
        self._context = SecureContext(bootstrap.keys)
        # Of its own, because ``close`` must wait until it has sent everything, while other threads
        # may still use their sockets.
        self._control_context = SecureContext(bootstrap.keys)
        self.control = ControlClient(
            self._control_context, bootstrap.control, bootstrap.name, self._on_control
        )
        self._heartbeat = Heartbeat(self.control.send, bootstrap.heartbeat_s)
        self._stopped = False
        self._transfer: TransferThread | None = None

    def run(self) -> None:
        """Start, then run the step loop until the end. Raises errors of the start and of steps."""
        self._register(engine_id=EngineId(""), address=control.Address())
        spec, tp_rank, tp = self._spec, self._bootstrap.tp_rank, self._join_group()
        engine_id, followers, endpoint = draw_engine_id(), None, ""
        if tp is not None:
            if tp_rank == 0:
                # Listen before the other ranks learn the address, so that they can connect.
                followers = LeaderChannel(self._context, tp.tp_size)
                endpoint = followers.endpoint
            # All ranks use rank 0's values. Every rank must pass the same number of bytes.
            told = tp.broadcast_bytes(f"{engine_id} {endpoint}".ljust(MEETING_BYTES).encode())
            name, endpoint = told.decode().split()
            engine_id = EngineId(name)
        runner = ModelRunner(spec, tp=tp, progress=self._progress, pinned=self._bootstrap.pinned)
        self._progress("warming up", None)
        runner.warm_up()
        # The objects that exist now live as long as the rank. Exclude them from garbage
        # collection, so that a collection during a step is short.
        gc.freeze()
        gc.enable()
        transfer = self._transfer = self._new_transfer(runner, engine_id)
        transfer.wait_started(CONNECTOR_TIMEOUT_S)
        offload = self._new_offload(runner)
        rank = RankParts(spec, runner, transfer, offload, self.control.send)
        port = int(transfer.endpoint.rpartition(":")[2])
        # Without peers, no other process needs the address of the side channel.
        side_channel = tcp_endpoint(spec.advertise_address, port) if spec.has_peers else ""
        loop: Leader | Follower
        if tp_rank == 0:
            server = ServerLink(self._context)
            address = control.Address(requests=server.endpoint, side_channel=side_channel)
            requests = RequestLifecycle(
                spec,
                runner.layout.groups,
                runner.num_blocks,
                model_digest=runner.model_digest,
                engine_id=engine_id,
                port=port,
                grammars=runner.grammars,
                wake=self._wake,
                offload=None
                if offload is None
                else OffloadPlanner(
                    runner.layout.groups, spec.block_size, HostTier(offload.num_blocks)
                ),
            )
            beside_streams = CPU_TOKENS_BESIDE_STREAMS if spec.device == "cpu" else None
            scheduler = Scheduler(requests, beside_streams)
            record = StepRecord(self._bootstrap.step_record).write
            loop = Leader(rank, scheduler, server, followers, record)
        else:
            address = control.Address(side_channel=side_channel)
            loop = Follower(rank, tp_rank, self._context.connect(zmq.DEALER, endpoint))
        # Last: the server says Hello and peers shake hands once the registry has these addresses.
        self._register(engine_id, address)
        self._turn(loop, runner)
        transfer.close(timeout_s=2.0)
        if offload is not None:
            offload.close(timeout_s=2.0)

    def close(self) -> None:
        self.control.close()
        self._control_context.close()

    def _turn(self, loop: Leader | Follower, runner: ModelRunner) -> None:
        poller = zmq.Poller()
        for waker in (self._wakeup, *loop.sockets):
            poller.register(waker, zmq.POLLIN)
        said_ready = False
        while not (self._stopped or loop.stopped):
            # Not earlier: routers then send requests, which a server without rank 0 refuses.
            if loop.ready and not said_ready:
                said_ready = True
                leave_ends_to_supervisor()
                self.control.send(control.Ready(model=runner.model_files))
            self._wait(poller, loop.wait_s())
            loop.turn()
        loop.close()

    def _join_group(self) -> TPGroup | None:
        if self._spec.tensor_parallel_size == 1:
            return None
        self._progress("joining the TP group", None)
        tp_rank, indices = self._bootstrap.tp_rank, self._spec.device_indices
        device = f"cuda:{indices[tp_rank]}" if indices else self._spec.device
        return TPGroup(self._bootstrap.rendezvous, tp_rank, self._spec.tensor_parallel_size, device)

    def _new_transfer(self, runner: ModelRunner, engine_id: EngineId) -> TransferThread:
        spec, bootstrap = self._spec, self._bootstrap
        setup = native_setup(
            spec,
            RankIdentity(
                name=bootstrap.name,
                engine=spec.name,
                engine_id=engine_id,
                incarnation=bootstrap.incarnation,
                tp_rank=bootstrap.tp_rank,
                tp_size=spec.tensor_parallel_size,
            ),
            runner.kv_cache,
            runner.layout,
            kv_memory=runner.kv_memory,
            model_digest=runner.model_digest,
            total_kv_heads=runner.shape.num_kv_heads,
            first_kv_head=runner.first_kv_head,
            connector=new_connector(spec.kv_transfer, bootstrap.name, bootstrap.incarnation)
            if spec.has_peers
            else NoConnector(bootstrap.name),
            context=self._context,
            wake=self._wake,
            report=self.control.send,
            host=spec.bind_address,
        )
        return TransferThread(setup)

    def _new_offload(self, runner: ModelRunner) -> OffloadWorker | None:
        if not self._spec.kv_offload.host_memory:
            return None
        self._progress("allocating host memory", None)
        # With a hasher of its own, because only the transfer thread may use that thread's hasher.
        hasher = KVHasher(native_regions(runner.kv_cache, runner.layout))
        return OffloadWorker(
            kv_cache=runner.kv_cache,
            layout=runner.layout,
            host_memory_bytes=self._spec.kv_offload.host_memory,
            device_hasher=hasher if runner.kv_cache.is_cuda else None,
            wake=self._wake,
        )

    def _wait(self, poller: zmq.Poller, timeout_s: float) -> None:
        """Wait for a socket, a thread or the time-out; handle the supervisor's messages."""
        poller.poll(int(timeout_s * 1000))
        # Before reading the inbox, so that a message that arrives later wakes the next poll.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        # Sent by the step loop, not by a thread: heartbeats prove that this loop still runs.
        self._heartbeat.beat()
        while not self._inbox.empty():
            self._handle_control(self._inbox.get())

    def _handle_control(self, message: control.FromSupervisor) -> None:
        match message:
            case control.Registry():
                if self._transfer is not None and self._spec.has_peers:
                    self._transfer.update_registry(message.entries)
            case control.Drain():
                # The router and the server hold back new requests, so a rank need not do anything.
                self.control.send(control.Drained())
            case control.Stop():
                self._stopped = True
            case control.Suspects() | control.Answered() | control.Happened():
                pass  # sent to routers only

    def _on_control(self, message: control.FromSupervisor) -> None:
        self._inbox.put(message)
        self._wake()

    def _wake(self) -> None:
        """Wake the step loop. May be called from any thread."""
        os.eventfd_write(self._wakeup, 1)

    def _progress(self, text: str, fraction: float | None) -> None:
        self.control.send(control.Progress(text=text, fraction=fraction))

    def _register(self, engine_id: EngineId, address: control.Address) -> None:
        self.control.send(
            control.Register(
                name=self._bootstrap.name,
                incarnation=self._bootstrap.incarnation,
                engine_id=engine_id,
                address=address,
            )
        )
