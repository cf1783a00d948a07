"""A real rank as a process: TransferThread, connector, KV memory, side channel. Tests control it
through a pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.protocol.control import Entry, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import LaunchKeys
from pdlaunch.protocol.transfer import (
    CancelPull,
    GrantLease,
    PullFinished,
    StartPull,
    TransferCommand,
)
from tests.faulty.transfers import FaultPlan, FaultyConnector
from tests.transfer.fakes import entry_of, layout_of, random_cache, remote_of

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RankOptions:
    spec: EngineSpec
    keys: LaunchKeys
    engine_id: str
    incarnation: int = 1
    tp_rank: int = 0
    num_heads: int = 3
    total_heads: int = 3
    num_layers: int = 2
    head_dim: int = 4
    num_blocks: int = 32
    environment: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    faults: FaultPlan | None = None
    with_cumem: bool = False  # on a GPU: the KV cache is in a CuMem pool

    @property
    def name(self) -> str:
        return f"{self.spec.name}/rank-{self.tp_rank}"

    @property
    def seed(self) -> int:
        return sum(self.engine_id.encode()) + self.tp_rank


def run_rank(pipe: Connection, options: RankOptions) -> None:
    import torch

    from pdlaunch.config import connectors
    from pdlaunch.engine.memory.pools import open_kv_memory, open_memory_pools
    from pdlaunch.errors import TransferError
    from pdlaunch.protocol.sockets import SecureContext
    from pdlaunch.transfer.connectors.connector import (
        BlockRead,
        Connection,
        Connector,
        Read,
        new_connector,
    )
    from pdlaunch.transfer.handshake import RankIdentity, native_setup
    from pdlaunch.transfer.thread import TransferThread

    # The fork server may have listed connectors before a test added a package.
    connectors._others.cache_clear()
    spec, settings = options.spec, options.spec.kv_transfer
    environ, carrier = dict(options.environment), settings.connector_section
    on = "cpu" if options.device == "cpu" else "cuda"
    os.environ.update(environ | carrier.environment(environ, on, None))
    torch.set_num_threads(1)
    layout = layout_of(
        options.num_heads,
        block_size=spec.block_size,
        num_layers=options.num_layers,
        head_dim=options.head_dim,
    )
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    source = open_kv_memory(
        open_memory_pools(enabled=options.with_cumem, device=device),
        device,
        shared=carrier.maps_memory,
        mapped_alone=carrier.only_maps_memory,
    )
    content = source.zeros(options.num_blocks * layout.block_bytes).view(torch.float32)
    kv_cache = content.view(options.num_blocks, *layout.block_shape())
    if device.type == "cuda":
        kv_cache.normal_(generator=torch.Generator(device).manual_seed(options.seed))
    else:
        kv_cache.copy_(random_cache(layout, options.num_blocks, options.seed))
    lock, happened, going_on = threading.Lock(), threading.Event(), threading.Event()
    going_on.set()

    def send(kind: str, value: Any) -> None:
        with lock:
            pipe.send((kind, value))

    connector: Connector
    if options.faults is not None:
        inner = new_connector(settings, options.name, options.incarnation)
        connector = FaultyConnector(inner, options.faults)
    elif (settings.connector, settings.nixl.path, device.type) == ("nixl", "p2p", "cpu"):
        connector = held_connector(options, going_on)
    else:
        connector = new_connector(settings, options.name, options.incarnation)
    interruptions: list[tuple[str, int]] = []

    class InterruptedConnection(Connection):
        """Stops the holder's process just before a READ is posted, or kills it before or after. A
        READ that does not need the holder's process stops after its first piece.
        """

        def __init__(self, inner: Connection) -> None:
            self.inner = inner
            self.close, self.read_scratch = inner.close, inner.read_scratch  # type: ignore[method-assign]

        def read(self, blocks: BlockRead) -> Read:
            kind, pid = interruptions.pop() if interruptions else ("", 0)
            if kind == "kill before":
                kill_process(pid)
            if kind == "stop":
                stop_process(pid)
                going_on.clear()
            read = self.inner.read(blocks)
            if kind == "kill after":
                os.kill(pid, signal.SIGKILL)
            if kind == "stop":
                send("posted", None)
            return read

        def read_scratch(self, *_: Any) -> Any: ...

    connect = connector.connect
    connector.connect = lambda peer: {  # type: ignore[method-assign]
        path: each if isinstance(each, TransferError) else InterruptedConnection(each)
        for path, each in connect(peer).items()
    }
    transfer = TransferThread(
        native_setup(
            spec,
            RankIdentity(
                options.name,
                spec.name,
                options.engine_id,
                options.incarnation,
                options.tp_rank,
                spec.tensor_parallel_size,
            ),
            kv_cache,
            layout,
            kv_memory=source,
            model_digest="digest",
            total_kv_heads=options.total_heads,
            first_kv_head=options.tp_rank * options.num_heads,
            connector=connector,
            context=SecureContext(options.keys),
            wake=happened.set,
            report=lambda message: send("report", message),
            host=spec.bind_address,
        )
    )

    def forward() -> None:
        while True:
            happened.wait()
            happened.clear()
            for event in transfer.take_events():
                send("event", event)

    threading.Thread(target=forward, daemon=True).start()
    transfer.wait_started(TIMEOUT_S)
    actions: dict[str, Callable[..., Any]] = {
        "submit": transfer.submit,
        "registry": transfer.update_registry,
        "blocks": lambda block_ids: kv_cache[block_ids].cpu().numpy(),
        "digest": lambda flipped: digest_of(kv_cache.flip(0) if flipped else kv_cache),
        "flip": lambda block_id, head: flip_byte(kv_cache, block_id, head),
        "interrupt": lambda kind, pid: interruptions.append((kind, pid)),
        "go_on_reading": going_on.set,
    }
    send("started", transfer.endpoint)
    while True:
        action, arguments = pipe.recv()
        send("result", actions[action](*arguments))


def held_connector(options: RankOptions, going_on: threading.Event) -> Any:
    """A connector that waits for ``going_on`` after its first piece."""

    from pdlaunch.transfer.connectors.p2p import P2PConnector
    from pdlaunch.transfer.connectors.piece_copies import HostCopier

    def move(destination: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(destination, source, num_bytes)
        going_on.wait()

    return P2PConnector(
        options.name, options.incarnation, new_copier=lambda device: HostCopier(move)
    )


def stop_process(pid: int) -> None:
    """Send SIGSTOP and wait until all threads have stopped: they run on until the thread that got
    the signal is scheduled.
    """
    os.kill(pid, signal.SIGSTOP)
    while any(state_of(task) != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.001)


def kill_process(pid: int) -> None:
    """Send SIGKILL and wait until the process has died, perhaps as a zombie."""
    os.kill(pid, signal.SIGKILL)
    # The parent may reap the process at any time.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while state_of(Path(f"/proc/{pid}")) not in "ZX":
            time.sleep(0.001)


def state_of(task: Path) -> str:
    """The state of a thread or process, one letter. The name before it may have any characters."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def flip_byte(kv_cache: Any, block_id: int, head: int) -> None:
    import torch

    share = kv_cache[block_id, head].view(torch.uint8).view(-1)
    share[len(share) // 2] ^= 1


def digest_of(kv_cache: Any) -> int:
    return xxhash.xxh3_64_intdigest(kv_cache.cpu().numpy())


def fork_server_context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pdlaunch.transfer.thread", "tests.transfer.rank_process"])
    return context


class RankHandle:
    """The test's end of the pipe to a rank."""

    def __init__(self, options: RankOptions) -> None:
        context = fork_server_context()
        self.options = options
        self._pipe, child_end = context.Pipe()
        self.process = context.Process(target=run_rank, args=(child_end, options), daemon=True)
        self.process.start()
        child_end.close()
        self._seen: list[tuple[str, Any]] = []
        self._endpoint = ""

    @property
    def endpoint(self) -> str:
        self._endpoint = self._endpoint or self.wait("started")
        return self._endpoint

    def entry(self) -> Entry:
        options, spec = self.options, self.options.spec
        fields = {"incarnation": options.incarnation, "tp_size": spec.tensor_parallel_size}
        fields |= {"tp_rank": options.tp_rank}
        return entry_of(spec.name, spec.role, options.engine_id, self.endpoint, **fields)

    def remote(self, lease_id: str) -> RemoteKV:
        """As in kv_transfer_params. Host and port are wrong, since the puller may not use them."""
        return remote_of(self.options.engine_id, lease_id)

    def connect(self, *holders: RankHandle) -> list[PairReady]:
        """Shake hands with all holders; return the reports of the pairs."""
        self.call("registry", [self.entry(), *(holder.entry() for holder in holders)])
        return [self.report(PairReady) for _ in holders]

    def pull_from(self, holder: RankHandle, name: str) -> None:
        holder.submit(grant(name, [3, 1, 4]))
        self.submit(pull(name, holder.remote(name), [9, 2, 6]))
        finished = self.event(PullFinished)
        assert finished.ok, finished.error
        np.testing.assert_array_equal(self.blocks([9, 2, 6]), holder.blocks([3, 1, 4]))

    def call(self, action: str, *arguments: Any) -> Any:
        self._pipe.send((action, arguments))
        return self.wait("result")

    def submit(self, *commands: TransferCommand) -> None:
        self.call("submit", list(commands))

    def blocks(self, block_ids: list[int]) -> np.ndarray:
        return self.call("blocks", block_ids)

    def event(self, kind: type) -> Any:
        return self.wait("event", kind)

    def report(self, kind: type) -> Any:
        return self.wait("report", kind)

    def has_seen(self, kind: type) -> bool:
        """True if an event of this kind came and was kept while the test waited for others."""
        return any(channel == "event" and isinstance(value, kind) for channel, value in self._seen)

    def wait(self, channel: str, kind: type = object, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait for the next message of this kind; keep other messages for later."""
        for index, (found, value) in enumerate(self._seen):
            if found == channel and isinstance(value, kind):
                return self._seen.pop(index)[1]
        while self._pipe.poll(timeout_s):
            found, value = self._pipe.recv()
            if found == channel and isinstance(value, kind):
                return value
            self._seen.append((found, value))
        raise TimeoutError(
            f"{self.options.name}: no {channel} {kind.__name__} within {timeout_s} s; seen: "
            f"{self._seen}"
        )

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._pipe.close()


def hashes(num_blocks: int, salt: str = "") -> list[bytes]:
    return [f"{salt}{index}".encode().ljust(32, b".") for index in range(num_blocks)]


def grant(
    lease_id: str,
    block_ids: list[int],
    *,
    lease_s: float = 60.0,
    num_readers: int = 1,
    salt: str = "",
) -> GrantLease:
    return GrantLease(
        lease_id=lease_id,
        block_ids=[block_ids],
        first_block_index=[0],
        block_hashes=hashes(len(block_ids), salt),
        num_tokens=16 * len(block_ids),
        num_readers=num_readers,
        lease_s=lease_s,
    )


def pull(
    pull_id: str, remote: RemoteKV, block_ids: list[int], *, skip: int = 0, salt: str = ""
) -> StartPull:
    """Pull the blocks after the first ``skip`` of a prompt of ``skip + len(block_ids)`` blocks."""
    return StartPull(
        pull_id=pull_id,
        request_id=pull_id,
        remote=remote,
        block_ids=[block_ids],
        first_block_index=[skip],
        block_hashes=hashes(skip + len(block_ids), salt),
        num_tokens=16 * (skip + len(block_ids)),
    )


def cancel(pull_id: str) -> CancelPull:
    return CancelPull(pull_id=pull_id)
