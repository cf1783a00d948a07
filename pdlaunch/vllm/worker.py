"""Runs the transfers of one vLLM worker with a ``TransferThread``, as ranks of native engines do.

::

    sidecar ── Peers ──▶ link ──▶ transfer thread ── RankUp, PairReady, .. ──▶ link ──▶ sidecar
    vLLM    ── commands ─ gate ─▶ transfer thread ── LeaseEnded, PullFinished ──▶ vLLM's next step
                          └ waits for work that was launched on the device before
"""

import logging
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pdlaunch import __version__
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
from pdlaunch.engine.memory.pools import KV_CACHE, DeviceKVMemory, MemoryPools
from pdlaunch.errors import MemoryPoolError
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.observe.counters import COUNTERS
from pdlaunch.protocol import engine_link
from pdlaunch.protocol.control import Entry, PairFailed, PairReady, SleepState, ToSupervisor
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.protocol.process.bootstrap import ControlClient
from pdlaunch.protocol.side_channel import PROTOCOL_VERSION, Compatibility
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    GrantLease,
    LeaseEnded,
    PullDrained,
    PullFinished,
    StartPull,
    TransferCommand,
)
from pdlaunch.transfer.connectors.connector import new_connector
from pdlaunch.transfer.handshake import RankIdentity, TransferSetup
from pdlaunch.transfer.integrity.checksum import algorithm_for
from pdlaunch.transfer.thread import TransferThread
from pdlaunch.vllm.layout import VllmLayout

_logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 2.0
SLEEP_TIMEOUT_S = 20.0
UNMAP_TIMEOUT_S = 5.0
IDLE_WAIT_S = 0.002
# With Python's default of 5 ms, the transfer thread would wait in each turn, ten times for a pull.
SWITCH_INTERVAL_S = 0.0005


@dataclass(slots=True)
class Results:
    """The events since the last step. Sets of strings contain request ids."""

    sent: set[str] = field(default_factory=set)  # leases that have ended: their blocks are free
    received: set[str] = field(default_factory=set)  # pulls that have ended: no READ writes
    failed: set[str] = field(default_factory=set)  # pulls in ``received`` that failed
    bad_blocks: set[int] = field(default_factory=set)  # blocks of the failed pulls


# Counters in vLLM's metrics, the same as those of native engines for leases and pulls. vLLM adds up
# the counts of all ranks, so only rank 0 counts pulls; each rank counts its bytes and failures.
FIGURES = {
    name: known.text
    for name, known in COUNTERS.items()
    if name.startswith("kv_") and not name.startswith(("kv_offload_", "kv_recomputed_"))
} | {"kv_read_seconds": "Seconds of the READs of pulls, of rank 0."}


class Worker:
    """Only the thread of vLLM's step loop may call the public methods."""

    def __init__(
        self,
        setup: engine_link.KVSetup,
        layout: VllmLayout,
        *,
        dp_rank: int,
        tp_rank: int,
        tp_size: int,
        dtype: str,
        vllm_version: str,
        pools: MemoryPools,
    ) -> None:
        """Open the connector and send the sidecar a RankUp. ``pools``: contain the KV cache; plain
        ``MemoryPools`` if vLLM allocated it. Raises TransferError, ConfigError.
        """
        self._settings = settings = KVTransferSettings.model_validate_json(setup.kv_transfer)
        self._figures: dict[str, float] = {}  # counts since the last ``take_figures``
        self._is_first = tp_rank == 0
        self._pools = pools
        self._peers: Sequence[Entry] = ()
        # The pulls that vLLM waits for, by request id.
        self._loads: dict[str, StartPull] = {}
        self._gate = ThreadPoolExecutor(1, "kv-gate")
        self._granted: set[LeaseId] = set()  # granted leases whose command will come again
        self._grant_lock = threading.Lock()
        self._woken = threading.Event()  # set if the transfer thread has events
        self._has_results = False  # the last ``take`` returned ended pulls
        self._device = layout.kv.device
        engine_id = setup.id_of(dp_rank)
        engine = engine_link.dp_engine(setup.name, dp_rank, setup.dp_size)
        name = engine_link.rank_name(engine, tp_rank)
        self._context = SecureContext(setup.keys)
        self._link = ControlClient(
            self._context,
            setup.link,
            name,
            self._on_message,
            encode=engine_link.from_engine.encode,
            decode=engine_link.to_worker.decode,
        )
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        connector = new_connector(settings, name, setup.incarnation)
        self._transfer: TransferThread | None = None
        transfer = TransferThread(
            TransferSetup(
                identity=RankIdentity(
                    name=name,
                    engine=engine,
                    engine_id=engine_id,
                    incarnation=setup.incarnation,
                    tp_rank=tp_rank,
                    tp_size=tp_size,
                ),
                role=setup.role,
                settings=settings,
                compatibility=Compatibility(
                    protocol_version=PROTOCOL_VERSION,
                    pdlaunch_version=__version__,
                    model_digest=setup.model_digest,
                    dtype=dtype,
                    kv_dtype="",  # part of ``pages``
                    block_size=0,  # part of ``groups``
                    groups=layout.groups,
                    num_kv_heads=layout.total_heads,
                    head_dim=0,  # part of ``pages``
                    layout=f"vLLM {vllm_version}, {layout.pages}",
                    connector=connector.name,
                    checksum=algorithm_for(layout.kv) if settings.verify else "off",
                ),
                kv=layout.kv,
                # Exports the KV cache by handles of our pools, or by CUDA IPC
                kv_memory=PrivateKVMemory()
                if self._device.type == "cpu"
                else DeviceKVMemory(pools, self._device),
                first_kv_head=layout.first_head,
                connector=connector,
                context=self._context,
                wake=self._woken.set,
                report=self._report,
                host=setup.bind_address,
            )
        )
        transfer.wait_started(START_TIMEOUT_S)
        firsts = [layout.kv.places[group[0]] for group in layout.kv.groups]
        _logger.info(
            "KV blocks: %s; %d regions of %d blocks, the first of each group at %s",
            layout.pages,
            len(layout.kv.regions),
            layout.kv.num_blocks,
            "; ".join(f"{each.address:#x}, {each.stride_bytes} bytes apart" for each in firsts),
        )
        self._transfer = transfer
        transfer.update_registry(self._peers)
        self._link.send(
            engine_link.RankUp(
                tp_rank=tp_rank,
                tp_size=tp_size,
                dp_rank=dp_rank,
                engine_id=engine_id,
                side_channel=tcp_endpoint(
                    setup.advertise_address, int(transfer.endpoint.rpartition(":")[2])
                ),
            )
        )

    def submit(self, commands: Sequence[TransferCommand]) -> None:
        pulls: list[StartPull] = []
        assert self._transfer is not None
        for command in commands:
            match command:
                case StartPull():
                    pulls.append(command)
                    if any(command.block_ids):
                        self._loads[command.pull_id] = command
                case GrantLease():
                    self._grant(command)
                case _:
                    self._transfer.submit([command])
        if self._device.type == "cpu":
            self._transfer.submit(pulls)
        elif pulls:
            # Wait for earlier steps on the device, which may still write to the pulls' blocks.
            before = torch.cuda.current_stream(self._device).record_event()
            self._gate.submit(self._submit_after, before, pulls)

    def take(self, *, idle: bool = False) -> Results:
        """Return the events since the last call. Raises TransferError if the transfer thread died.
        ``idle``: vLLM computes nothing and calls again at once, so wait a moment for the transfer
        thread. Not after ended pulls: vLLM reads them only in the next step.
        """
        assert self._transfer is not None
        if idle and not self._has_results:
            self._woken.wait(IDLE_WAIT_S)
        self._woken.clear()
        results = Results()
        for event in self._transfer.take_events():
            match event:
                case LeaseEnded(lease_id=lease_id, reason=reason):
                    results.sent.add(lease_id)
                    if reason == "expired" and self._is_first:
                        self._add(kv_leases_expired=1.0)
                case PullFinished():
                    self._count(event)
                    if not event.in_flight:  # otherwise its READs may still write
                        self._finish(event.pull_id, results, ok=event.ok)
                case PullDrained(pull_id=pull_id):
                    self._finish(pull_id, results, ok=False)
        self._has_results = bool(results.received)
        return results

    def take_figures(self) -> dict[str, float]:
        figures, self._figures = self._figures, {}
        return figures

    def sleep(self) -> None:
        """Disconnect peers and free the memory of the KV cache. Raises TransferError if a lease or
        pull does not end, or MemoryPoolError; then the worker stays awake.
        """
        assert self._transfer is not None
        if self._pools.sleeping_tags:
            return
        self._transfer.suspend(SLEEP_TIMEOUT_S)
        self._link.send(SleepState(state="sleeping"))  # so that peers unmap the memory
        self._transfer.wait_unmapped(UNMAP_TIMEOUT_S)
        try:
            self._pools.sleep((KV_CACHE,))
        except MemoryPoolError:
            self._reconnect(self._transfer)
            raise

    def wake_up(self) -> None:
        """Allocate the memory again and connect to peers. Raises TransferError, MemoryPoolError."""
        assert self._transfer is not None
        if self._pools.sleeping_tags:
            self._pools.wake_up((KV_CACHE,))
            self._reconnect(self._transfer)

    def close(self) -> None:
        if self._transfer is not None:
            self._gate.shutdown(cancel_futures=True)
            self._transfer.close(CLOSE_TIMEOUT_S)
            self._link.close()
            self._context.close()
            self._transfer = None

    def _reconnect(self, transfer: TransferThread) -> None:
        transfer.resume(SLEEP_TIMEOUT_S)
        self._link.send(SleepState(state="awake"))

    def _submit_after(self, before: torch.cuda.Event, commands: Sequence[TransferCommand]) -> None:
        before.synchronize()
        if (transfer := self._transfer) is not None:
            transfer.submit(commands)

    def _finish(self, pull_id: str, results: Results, *, ok: bool) -> None:
        """Report the end of a pull, if vLLM waits for it. No READ may write any more."""
        if (load := self._loads.pop(pull_id, None)) is None:
            return
        results.received.add(pull_id)
        if not ok:
            results.failed.add(pull_id)
            results.bad_blocks.update(block_id for group in load.block_ids for block_id in group)

    def _count(self, event: PullFinished) -> None:
        load = self._loads.get(event.pull_id)
        if load is None:
            return
        has_failed = not event.ok and event.error != "cancelled"
        self._add(
            kv_transfer_bytes=float(event.num_bytes),
            kv_transfer_failures=float(has_failed),
            **event.counts,
        )
        if self._is_first:
            self._add(
                kv_transfers=float(event.ok),
                kv_transfer_seconds=event.seconds if event.ok else 0.0,
                kv_read_seconds=event.read_s,
            )
        if not has_failed:
            return
        engine_id = load.remote.engine_id
        engine = next((each.engine for each in self._peers if each.engine_id == engine_id), "")
        _logger.warning(
            "request %s does not use KV blocks of %s: %s", event.pull_id, engine, event.error
        )
        if engine and event.blames_pair:
            failure = engine_link.PullFailure(
                peer_engine=engine_link.engine_of_rank(engine), error=event.error
            )
            self._link.send(failure)

    def _add(self, **figures: float) -> None:
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value

    def _on_message(self, message: engine_link.ToWorker) -> None:
        if isinstance(message, GrantLease):
            self._grant(message)
            return
        self._peers = message.entries
        if self._transfer is not None:
            self._transfer.update_registry(message.entries)

    def _grant(self, grant: GrantLease) -> None:
        """Grant a lease when its command first comes; it comes over the link and with a step."""
        with self._grant_lock:
            is_first = grant.lease_id not in self._granted
            self._granted ^= {grant.lease_id}
        # The prompt has its first token, so no kernel writes to its blocks any more.
        if is_first and self._transfer is not None:
            self._transfer.submit([grant])

    def _report(self, message: ToSupervisor) -> None:
        if isinstance(message, PairReady | PairFailed):
            self._link.send(message)
