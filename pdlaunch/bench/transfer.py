"""Times pulls of KV blocks from a prefill rank to a decode rank (``pdlaunch bench transfer``).

A speed is the number of moved bytes divided by the median time for scattered blocks. There are
three: of READs alone, of whole pulls (side channel, lease, READ) without checksums, and of whole
pulls with checksums, the default. Each rank is a process. Pulls with and without checksums
alternate, so that other work on the machine slows both equally.

``python -m pdlaunch.bench.transfer JSON`` prints rows of JSON. The command runs it as a process, so
that the command itself does not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, get_args

import msgspec
import torch

from pdlaunch.config.connectors import KVPath, MooncakeProtocol
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.memory.pools import open_kv_memory, open_memory_pools
from pdlaunch.errors import PdlaunchError, TransferError
from pdlaunch.planning.role_engines import DTypeName
from pdlaunch.protocol.control import Address, Entry, PairFailed, PairReady, ToSupervisor
from pdlaunch.protocol.ids import EngineId, LeaseId, PullId, RequestId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import GrantLease, LeaseEnded, PullFinished, StartPull
from pdlaunch.transfer.connectors.connector import new_connector
from pdlaunch.transfer.handshake import RankIdentity, draw_engine_id, native_setup
from pdlaunch.transfer.thread import TransferThread

LEASE_S = 600.0
NUM_WARM_UP_TURNS = 2
_TIMEOUT_S = 120.0

Timing = dict[str, str | int | float]  # a row: path, blocks, megabytes, and speeds in GB/s


class TransferOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a measurement; the default shape is the demo model's."""

    # Paths of the connector nixl (``KVPath``), or names of other connectors
    paths: Sequence[str] = ("auto",)
    num_blocks: Sequence[int] = (16, 128)
    num_repeats: int = 10
    num_layers: int = 30
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    dtype: DTypeName = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    enable_cumem_allocator: bool = False
    mooncake_protocol: MooncakeProtocol = "tcp"
    # The settings of a launch: the ranks only shake hands, as the pairs of the launch do
    kv_transfer: dict[str, Any] | None = None

    def layout(self) -> KVCacheLayout:
        return KVCacheLayout(
            groups=make_groups([None] * self.num_layers),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype_bytes=getattr(torch, self.dtype).itemsize,
        )


def bench_transfer(options: TransferOptions) -> list[Timing]:
    """Time pulls for each path and each number of blocks. Raises TransferError."""
    rows = []
    for path in options.paths:
        of_nixl = path in get_args(KVPath)
        with (
            tempfile.TemporaryDirectory(prefix="pdlaunch-bench-") as folder,
            contextlib.ExitStack() as stack,
        ):
            given = {
                "connector": "nixl" if of_nixl else path,
                "nixl": {"path": path if of_nixl else "auto"},
                "mooncake": {"protocol": options.mooncake_protocol},
                "file": {"directory": folder},
                **{"lease_s": LEASE_S, "pull_timeout_s": LEASE_S, "pull_attempts": 1},
            }
            settings = KVTransferSettings.model_validate(given)
            # Both pairs exist at the same time, so that their pulls can alternate.
            unchecked = settings.model_copy(update={"verify": False})
            pairs = [RankPair(stack, each, options) for each in (unchecked, settings)]
            rows += [_measure(pairs, options, count) for count in options.num_blocks]
    return rows


def _measure(pairs: Sequence[RankPair], options: TransferOptions, count: int) -> Timing:
    """Pull ``count`` blocks without and with checksums, in turns. All turns pull equal blocks."""
    source = random.Random(count)
    local, remote = (source.sample(range(max(options.num_blocks)), count) for _ in range(2))
    num_turns = NUM_WARM_UP_TURNS + options.num_repeats
    turns = [[pair.pull(local, remote) for pair in pairs] for _ in range(num_turns)]
    # Each pull has two times: that of the whole pull, and that of its READ.
    (pull_s, read_s), (verified_s, _) = (
        [statistics.median(values) for values in zip(*times, strict=True)]
        for times in zip(*turns[NUM_WARM_UP_TURNS:], strict=True)
    )
    gigabytes = count * options.layout().block_bytes / 1e9
    times_s = {"read": read_s, "unverified": pull_s, "pull": verified_s}
    return {
        "path": ", ".join(sorted({pair.ready.path for pair in pairs})),
        "num_blocks": count,
        "megabytes": round(gigabytes * 1e3, 2),
        **{f"{name}_gb_per_s": round(gigabytes / time_s, 3) for name, time_s in times_s.items()},
        "overhead_us": round((pull_s - read_s) * 1e6),
        "checksum_percent": round((verified_s / pull_s - 1) * 100, 1),
    }


class RankPair:
    """Runs a prefill rank and a decode rank in two processes, connected by a handshake."""

    def __init__(
        self, stack: contextlib.ExitStack, settings: KVTransferSettings, options: TransferOptions
    ) -> None:
        """Start the ranks; ``stack`` stops them."""
        context = multiprocessing.get_context("forkserver")
        # Import torch once, not in every process. Do not preload this module: children run it as
        # ``__main__``, and runpy warns if it was already imported.
        context.set_forkserver_preload(["pdlaunch.transfer.thread", "pdlaunch.engine.memory.pools"])
        keys, self._engine_id, self._num_pulls = new_launch_keys(), draw_engine_id(), 0
        self._pools = {role: ProcessPoolExecutor(1, context) for role in PAIR}
        for role, engine_id in zip(PAIR, (self._engine_id, draw_engine_id()), strict=True):
            stack.callback(self._stop, role)
            self._call(role, "start", role, engine_id, settings, options, keys)
        entries = [self._call(role, "entry") for role in PAIR]
        self.ready: PairReady = self._call("decode", "connect", entries)

    def _call(self, role: Role, method: str, *arguments: object) -> Any:
        try:
            return self._pools[role].submit(_call, role, method, *arguments).result()
        except BrokenProcessPool as error:
            raise TransferError(f"a process of the benchmark ended: {error}") from error

    def _stop(self, role: Role) -> None:
        with contextlib.suppress(BrokenProcessPool):
            self._pools[role].submit(os._exit, 0)
        self._pools[role].shutdown(wait=False)

    def pull(self, local: list[int], remote: list[int]) -> tuple[float, float]:
        """Grant a lease and pull its blocks; return the times of the pull and of its READ."""
        self._num_pulls += 1
        name, num_tokens = f"pull-{self._num_pulls}", len(local)
        # The hashes are arbitrary, but both sides must have the same ones.
        hashes = [index.to_bytes(32) for index in range(num_tokens)]
        same: Any = {"first_block_index": [0], "block_hashes": hashes, "num_tokens": num_tokens}
        grant = GrantLease(
            lease_id=LeaseId(name), block_ids=[remote], num_readers=1, lease_s=LEASE_S, **same
        )
        # The call returns before the checksums are ready; a faster pull waits for them.
        self._call("prefill", "grant", grant)
        remote_kv = RemoteKV(
            engine_id=self._engine_id,
            lease_id=LeaseId(name),
            host="",
            port=0,
            block_ids=[],
            num_tokens=num_tokens,
            tp_size=1,
        )
        command = StartPull(
            pull_id=PullId(name),
            request_id=RequestId(name),
            remote=remote_kv,
            block_ids=[local],
            **same,
        )
        times: tuple[float, float] = self._call("decode", "pull", command)
        self._call("prefill", "wait_for", LeaseEnded)
        return times


class Rank:
    """A rank whose KV cache has random numbers: it grants leases and pulls blocks."""

    def start(
        self,
        role: Role,
        engine_id: EngineId,
        settings: KVTransferSettings,
        options: TransferOptions,
        keys: LaunchKeys,
    ) -> None:
        logging.disable()  # the parent gets errors as exceptions
        torch.set_num_threads(1)
        on_cpu = options.device == "cpu"
        # Prefill and decode use different GPUs if there are two.
        index = 0 if on_cpu or role == "prefill" else 1 % torch.cuda.device_count()
        device = torch.device("cpu") if on_cpu else torch.device("cuda", index)
        os.environ.update(settings.connector_section.environment(os.environ, options.device))
        # UCX prints its transport. The connector can read it if standard output is a file.
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 1)
        num_blocks, layout = max(options.num_blocks), options.layout()
        memory = open_kv_memory(
            open_memory_pools(enabled=options.enable_cumem_allocator, device=device),
            device,
            shared=settings.connector_section.maps_memory,
            mapped_alone=settings.connector_section.only_maps_memory,
        )
        pages = memory.zeros(num_blocks * layout.block_bytes).view(getattr(torch, options.dtype))
        engine, name = f"{role}-0", f"{role}-0/rank-0"
        self._role = role
        self._identity = RankIdentity(name, engine, engine_id, incarnation=1, tp_rank=0, tp_size=1)
        self._reports: queue.SimpleQueue[ToSupervisor] = queue.SimpleQueue()
        self._woken = threading.Event()
        spec = EngineSpec(
            name=engine,
            role=role,
            model_dir=".",
            served_model_name="bench",
            dtype=options.dtype,
            max_model_len=num_blocks * options.block_size,
            enable_cumem_allocator=False,
            max_num_batched_tokens=options.block_size,
            device=options.device,
            device_indices=() if on_cpu else (index,),
            tensor_parallel_size=1,
            num_threads=1,
            kv_transfer=settings,
        )
        self._transfer = TransferThread(
            native_setup(
                spec,
                self._identity,
                pages.view(num_blocks, *layout.block_shape()).normal_(),
                layout,
                kv_memory=memory,
                model_digest="bench",
                total_kv_heads=options.num_kv_heads,
                first_kv_head=0,
                connector=new_connector(settings, name, 1),
                context=SecureContext(keys),
                wake=self._woken.set,
                report=self._reports.put,
            )
        )
        # The thread opens the connector, which may take seconds on a GPU.
        self._transfer.wait_started(_TIMEOUT_S)

    def entry(self) -> Entry:
        """Return this rank's entry for the registry."""
        me, address = self._identity, Address(side_channel=self._transfer.endpoint)
        own: Any = {"engine": me.engine, "engine_id": me.engine_id, "role": self._role}
        return Entry(me.name, "rank", me.incarnation, address=address, **own)

    def connect(self, entries: list[Entry]) -> PairReady:
        """Wait until this rank can read from the peer."""
        self._transfer.update_registry(entries)
        while True:
            match self._reports.get(timeout=_TIMEOUT_S):
                case PairReady() as ready:
                    return ready
                case PairFailed() as failed:
                    raise TransferError(failed.error)
                case _:
                    continue

    def grant(self, command: GrantLease) -> None:
        self._transfer.submit([command])

    def pull(self, command: StartPull) -> tuple[float, float]:
        self._transfer.submit([command])
        event: PullFinished = self.wait_for(PullFinished)
        if not event.ok:
            raise TransferError(event.error)
        return event.seconds, event.read_s

    def wait_for(self, kind: type) -> Any:
        while self._woken.wait(_TIMEOUT_S):
            # Clear first, so that an event that arrives during the loop wakes the next turn.
            self._woken.clear()
            for event in self._transfer.take_events():
                if isinstance(event, kind):
                    return event
        raise TransferError(f"no {kind.__name__} within {_TIMEOUT_S:g} s")


_rank = Rank()  # the one rank of a child process


def _call(role: Role, method: str, *arguments: object) -> Any:
    try:
        return getattr(_rank, method)(*arguments)
    except Exception as error:  # Not every exception can be sent to the parent.
        raise TransferError(f"{role}: {error}") from None


def main() -> None:
    """Read ``TransferOptions`` from a JSON argument; print the rows, or the measured pair."""
    options = msgspec.json.decode(sys.argv[1], type=TransferOptions)
    try:
        if options.kv_transfer is None:
            found: object = bench_transfer(options)
        else:
            settings = KVTransferSettings.model_validate(options.kv_transfer)
            with contextlib.ExitStack() as stack:
                found = RankPair(stack, settings, options).ready
    except PdlaunchError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


if __name__ == "__main__":
    # Imported by name, so that ranks unpickle the same classes.
    from pdlaunch.bench import transfer

    transfer.main()
