"""Runs the transfers of one worker of vLLM: a ``TransferThread``, as ranks of native engines have.

::

    sidecar ── Peers ──▶ link ──▶ transfer thread ── RankUp, PairReady, .. ──▶ link ──▶ sidecar
    vLLM    ── commands ─ gate ─▶ transfer thread ── LeaseEnded, PullFinished ──▶ vLLM's next step
                          └ once the device has done what was launched before
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from pdlaunch import __version__
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.device_kv_memory import DeviceKVMemory
from pdlaunch.engine.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.engine.memory.pools import KV_CACHE, MemoryPools
from pdlaunch.errors import MemoryPoolError
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.observe.counters import COUNTERS
from pdlaunch.protocol.control import Entry, PairFailed, PairReady, SleepState, ToSupervisor
from pdlaunch.protocol.engine_link import (
    KVSetup,
    Peers,
    PullFailure,
    RankUp,
    dp_engine,
    engine_of_rank,
    from_worker,
    rank_name,
    to_worker,
)
from pdlaunch.protocol.process.bootstrap import ControlClient
from pdlaunch.protocol.side_channel import PROTOCOL_VERSION, Compatibility
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    LeaseEnded,
    PullDrained,
    PullFinished,
    StartPull,
    TransferCommand,
)
from pdlaunch.transfer.connectors.connector import new_connector
from pdlaunch.transfer.handshake import RankIdentity
from pdlaunch.transfer.integrity.checksum import algorithm_for
from pdlaunch.transfer.sides import TransferSetup
from pdlaunch.transfer.thread import TransferThread
from pdlaunch.vllm.layout import VllmLayout

_logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 2.0
SLEEP_TIMEOUT_S = 20.0
UNMAP_TIMEOUT_S = 5.0
IDLE_WAIT_S = 0.002
# Python's own 5 ms would let the transfer thread wait for each of its turns, ten in a pull.
SWITCH_INTERVAL_S = 0.0005


@dataclass(slots=True)
class Results:
    """Holds what has happened since the last step; ids are those of requests."""

    sent: set[str] = field(default_factory=set)  # their blocks are free
    received: set[str] = field(default_factory=set)  # nothing writes to their blocks any more
    failed: set[str] = field(default_factory=set)  # those of them whose bytes must not be used
    bad_blocks: set[int] = field(default_factory=set)  # the blocks of the failed ones


# Counters in vLLM's metrics: those of native engines for leases and pulls. vLLM adds up the counts
# of all ranks: only rank 0 counts pulls; each rank counts its bytes and failures.
FIGURES = {
    name: known.text
    for name, known in COUNTERS.items()
    if name.startswith("kv_") and not name.startswith(("kv_offload_", "kv_recomputed_"))
} | {"kv_read_seconds": "Seconds of the READs of pulls, of rank 0."}


class Worker:
    """Belongs to the thread of vLLM's step."""

    def __init__(
        self,
        setup: KVSetup,
        layout: VllmLayout,
        *,
        dp_rank: int,
        tp_rank: int,
        tp_size: int,
        dtype: str,
        vllm_version: str,
        pools: MemoryPools,
    ) -> None:
        """Open the connector and tell the sidecar. Raises TransferError, ConfigError.

        ``pools``: that the KV cache was allocated from; without CuMem where vLLM allocated it.
        """
        self._settings = settings = KVTransferSettings.model_validate_json(setup.kv_transfer)
        self._figures: dict[str, float] = {}  # since they were taken last
        self._is_first = tp_rank == 0
        self._pools = pools
        self._peers: Sequence[Entry] = ()
        # Blocks of the pulls that vLLM waits for, and which engine each asks.
        self._loads: dict[str, StartPull] = {}
        self._gate = ThreadPoolExecutor(1, "kv-gate")
        self._woken = threading.Event()  # the transfer thread has something to tell
        self._has_told = False  # in the last step
        self._device = layout.kv.device
        engine, engine_id = dp_engine(setup.name, dp_rank, setup.dp_size), setup.id_of(dp_rank)
        name = rank_name(engine, tp_rank)
        self._context = SecureContext(setup.keys)
        self._link = ControlClient(
            self._context,
            setup.link,
            name,
            self._on_message,
            encode=from_worker.encode,
            decode=to_worker.decode,
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
                    kv_dtype="",  # among the pages
                    block_size=0,  # among the groups
                    groups=layout.groups,
                    num_kv_heads=layout.total_heads,
                    head_dim=0,  # among the pages
                    layout=f"vLLM {vllm_version}, {layout.pages}",
                    connector=connector.name,
                    checksum=algorithm_for(layout.kv) if settings.verify else "off",
                ),
                kv=layout.kv,
                kv_memory=_memory_on(layout.kv.device, pools),
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
            RankUp(
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
        """Carry out what the scheduler has decided for this step."""
        for command in commands:
            if isinstance(command, StartPull) and any(command.block_ids):
                self._loads[command.pull_id] = command
        assert self._transfer is not None
        pulls = [each for each in commands if isinstance(each, StartPull)]
        # A prompt that is lent has its first token: whatever wrote its blocks has ended.
        self._transfer.submit([each for each in commands if not isinstance(each, StartPull)])
        if self._device.type == "cpu":
            self._transfer.submit(pulls)
        elif pulls:
            # Steps that were launched before may still write to blocks that are pulled into now.
            before = torch.cuda.current_stream(self._device).record_event()
            self._gate.submit(self._submit_behind, before, pulls)

    def take(self, *, idle: bool = False) -> Results:
        """Return what has happened. Raises TransferError when the transfer thread has died.

        ``idle``: vLLM computes nothing in this step and asks again at once. Waiting here leaves the
        interpreter to the transfer thread. But vLLM reads results only one step later.
        """
        assert self._transfer is not None
        if idle and not self._has_told:
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
                    if not event.in_flight:  # else its READs may still write
                        self._finish(event.pull_id, results, ok=event.ok)
                case PullDrained(pull_id=pull_id):
                    self._finish(pull_id, results, ok=False)
        self._has_told = bool(results.received)
        return results

    def take_figures(self) -> dict[str, float]:
        """Return what has been counted since the last call; empty: nothing."""
        figures, self._figures = self._figures, {}
        return figures

    def sleep(self) -> None:
        """Let peers go and give the memory of the KV cache back. Raises TransferError where a lease
        or pull does not end, and MemoryPoolError; then all is as before.
        """
        assert self._transfer is not None
        if self._pools.sleeping_tags:
            return
        self._transfer.suspend(SLEEP_TIMEOUT_S)
        self._link.send(SleepState(state="sleeping"))  # peers unmap the memory
        self._transfer.wait_unmapped(UNMAP_TIMEOUT_S)
        try:
            self._pools.sleep((KV_CACHE,))
        except MemoryPoolError:
            self._reconnect(self._transfer)
            raise

    def wake_up(self) -> None:
        """Take the memory again and let peers come. Raises TransferError, MemoryPoolError."""
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

    def _submit_behind(self, before: torch.cuda.Event, commands: Sequence[TransferCommand]) -> None:
        before.synchronize()
        if (transfer := self._transfer) is not None:
            transfer.submit(commands)

    def _finish(self, pull_id: str, results: Results, *, ok: bool) -> None:
        """Report the end of a pull, if vLLM waits for it: once, when nothing writes any more."""
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
            "KV blocks of request %s of %s are not used: %s", event.pull_id, engine, event.error
        )
        if engine and event.blames_pair:
            failure = PullFailure(peer_engine=engine_of_rank(engine), error=event.error)
            self._link.send(failure)

    def _add(self, **figures: float) -> None:
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value

    def _on_message(self, message: Peers) -> None:
        self._peers = message.entries
        if self._transfer is not None:
            self._transfer.update_registry(message.entries)

    def _report(self, message: ToSupervisor) -> None:
        if isinstance(message, PairReady | PairFailed):
            self._link.send(message)


def _memory_on(device: torch.device, pools: MemoryPools) -> KVMemory:
    """Return how peers reach the KV cache: through our pools' handles, or CUDA IPC."""
    return PrivateKVMemory() if device.type == "cpu" else DeviceKVMemory(pools, device)
