"""Moves KV blocks over NIXL with its UCX backend.

Descriptors of the KV cache are prepared once for each side: one for each block, and one for each
(block, head) for peers with other heads. A READ then names indices only, and NIXL merges
neighbours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdlaunch.config.connectors import opens_network
from pdlaunch.errors import TransferError
from pdlaunch.machine import network
from pdlaunch.machine.network import with_device_names
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    Read,
    ReadState,
    bind_device,
    memory_kind,
)
from pdlaunch.transfer.connectors.scratch import new_landing, piece_offsets

logger = logging.getLogger(__name__)

BACKEND = "UCX"

_DEVICES = "UCX_NET_DEVICES"

_MEMORY_NAMES = {"DRAM": "host memory", "VRAM": "GPU memory"}

_PYTHON_ERRORS = (RuntimeError, ValueError, ImportError)

_PROGRESS_INTERVAL_US = {"DRAM": 100_000, "VRAM": 1_000}
"""Sleep of UCX's progress thread when no event wakes it. NIXL's Python API fixes 0 here, which
spins on a whole core.
"""
_TIMED_SPIN_S = 0.002
"""Seconds for which a timed READ between GPUs is polled without a pause, which would take longer
than the READ.
"""


def load_nixl() -> tuple[Any, Any]:
    """Return NIXL's Python API and its C++ bindings. Importing them takes seconds, and reads the
    environment.
    """
    from nixl import _api, _bindings

    return _api, _bindings


def choose_devices(environ: MutableMapping[str, str]) -> None:
    """Put the name of the network device in the place of its address, which is all that the
    supervisor knows of another host. Before ``load_nixl``. Raises TransferError.
    """
    try:
        devices = with_device_names(environ.get(_DEVICES, ""))
    except LookupError as error:
        raise TransferError(str(error)) from None
    if devices:
        environ[_DEVICES] = devices


def new_agent(api: Any, bindings: Any, name: str, kind: str) -> Any:
    """Make an agent whose progress thread sleeps between events.

    ``api`` and ``bindings`` come from ``load_nixl``; ``kind`` is that of the memory it reads,
    ``DRAM`` or ``VRAM``.
    """
    # The wrapper is made without a backend and given an agent of its own below: the one that it
    # makes has a progress thread that never sleeps.
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    config.pthrDelay = _PROGRESS_INTERVAL_US[kind]
    agent.agent = bindings.nixlAgent(name, config)
    # With error handling UCX insists on a transport that listens on TCP, where it takes writes to
    # any address from anybody. Without it nobody is told of a peer's death. A trusted network has
    # such a listener anyway.
    mode = "peer" if opens_network(os.environ) else "none"
    agent.create_backend(BACKEND, {"ucx_error_handling_mode": mode})
    return agent


class NixlConnector(Connector):
    """Reads through one NIXL agent. ``open`` loads the library, with the variables of
    ``NixlSpec.environment`` applied.
    """

    name = "nixl"
    path = f"nixl/{BACKEND}"

    def __init__(
        self, name: str, incarnation: int, load: Callable[[], tuple[Any, Any]] = load_nixl
    ) -> None:
        """``name`` is the rank's, ``prefill-0/rank-0``."""
        self.agent_name = f"{name}#{incarnation}"
        self.backend_errors: tuple[type[Exception], ...] = _PYTHON_ERRORS
        self.agent: Any = None
        """Outlives ``close``, because READs may be pending when the process exits; ``open`` lets go
        of it.
        """
        self._load = load

    def open(self, memory: LocalMemory) -> None:
        self.kind, self.device_index = memory_kind(memory.kv_cache)
        self.memory = memory  # registered memory must not be freed
        bind_device(memory.kv_cache.device)  # UCX takes the context that is current
        choose_devices(os.environ)
        before = network.listeners()
        try:
            # NIXL never closes the endpoint of an agent that is removed, which is a socket on both
            # sides; a new agent has none.
            self.agent = None
            api, bindings = self._load()
            self.backend_errors = _PYTHON_ERRORS + _binding_errors(bindings)
            self.agent = new_agent(api, bindings, self.agent_name, self.kind)
            self._registrations = [
                self.agent.register_memory(tensor) for tensor in (memory.kv_cache, memory.scratch)
            ]
            self._metadata: bytes = self.agent.get_agent_metadata()
            base, num_blocks = memory.kv_cache.data_ptr(), memory.kv_cache.shape[0]
            self.pieces = self.describe_blocks(
                "", base, num_blocks, memory.layout.num_kv_heads, memory.layout.head_bytes
            )
        except self.backend_errors as error:
            raise TransferError(
                f"the NIXL agent {self.agent_name} cannot start: {error}"
            ) from error
        for each in sorted(network.listeners() - before, key=lambda each: each.port):
            logger.info(
                "takes KV blocks' READs at %s:%d (%s), over UCX_TLS %s: whoever reaches it can "
                "read and write this process (kv_transfer.trusted_network)",
                each.address,
                each.port,
                os.environ.get(_DEVICES),
                os.environ.get("UCX_TLS"),
            )

    def agent_metadata(self) -> bytes:
        return self._metadata

    def connect(self, peer: PeerAgent) -> Connection:
        geometry = peer.geometry
        if geometry.memory_kind != self.kind:
            raise TransferError(
                f"the KV cache of {peer.name} is in {_MEMORY_NAMES[geometry.memory_kind]}, "
                f"that of {self.agent_name} in {_MEMORY_NAMES[self.kind]}; NIXL is used between "
                "equal ones only (device)"
            )
        try:
            name = self.agent.add_remote_agent(peer.metadata)
        except self.backend_errors as error:
            raise TransferError(f"agent {peer.name} cannot be added: {error}") from error
        found = name.decode() if isinstance(name, bytes) else str(name)
        errors: tuple[type[Exception], ...] = (TransferError, *self.backend_errors)
        try:
            if found != peer.name:
                raise TransferError(f"the metadata of agent {peer.name} is that of {found}")
            pieces = self.describe_blocks(
                peer.name,
                geometry.base_address,
                geometry.num_blocks,
                geometry.num_kv_heads,
                geometry.head_bytes,
                geometry.device_index,
            )
        except errors as error:
            self.quietly(lambda: self.agent.remove_remote_agent(found))
            raise TransferError(f"agent {peer.name} cannot be read: {error}") from error
        return _NixlConnection(self, peer, pieces)

    def close(self) -> None:
        for prepared in self.pieces:
            self.quietly(prepared.release)
        for registration in self._registrations:
            self.quietly(partial(self.agent.deregister_memory, registration))
        del self.memory

    def describe_blocks(
        self,
        agent_name: str,
        base: int,
        num_blocks: int,
        num_heads: int,
        head_bytes: int,
        device_index: int | None = None,
    ) -> tuple[Any, Any]:
        """Return prepared descriptors: one for each block, and one for each (block, head)."""
        device = self.device_index if device_index is None else device_index
        found = []
        for size, count in (
            (num_heads * head_bytes, num_blocks),
            (head_bytes, num_blocks * num_heads),
        ):
            # One row stands for all pieces: address, length and device of the first, distance to
            # the next, and their number.
            row = np.array([[base, size, device, size, count]], dtype=np.uint64)
            found.append(self.agent.prep_xfer_dlist(agent_name, row, self.kind))
        return found[0], found[1]

    def quietly(self, act: Callable[[], object]) -> None:
        """Call ``act`` and ignore a refusal: backends refuse to release what has failed already."""
        with contextlib.suppress(*self.backend_errors):
            act()


@dataclass(frozen=True, slots=True, eq=False)
class _NixlConnection(Connection):
    connector: NixlConnector
    peer: PeerAgent
    pieces: tuple[Any, Any]  # prepared descriptors of the peer's blocks and heads

    def paths(self) -> Sequence[str]:
        return (NixlConnector.path,)

    def read(self, blocks: BlockRead) -> Read:
        ours, theirs = self.connector.pieces, self.pieces
        local_num_heads = self.connector.memory.layout.num_kv_heads
        remote_num_heads = self.peer.geometry.num_kv_heads
        if len(blocks.local_heads) == local_num_heads == remote_num_heads:
            arguments = (
                ours[0],
                _indices(blocks.local_blocks),
                theirs[0],
                _indices(blocks.remote_blocks),
            )
        else:
            arguments = (
                ours[1],
                _head_indices(blocks.local_blocks, local_num_heads, blocks.local_heads),
                theirs[1],
                _head_indices(blocks.remote_blocks, remote_num_heads, blocks.remote_heads),
            )
        agent = self.connector.agent
        return self._post(lambda: agent.make_prepped_xfer("READ", *arguments))

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        connector, geometry, memory = self.connector, self.peer.geometry, self.connector.memory
        offsets, size = piece_offsets(
            geometry.scratch_bytes, memory.layout.block_bytes, geometry.block_bytes
        )
        landing = new_landing(len(offsets) * size, memory.kv_cache.device)
        agent = connector.agent
        registration = agent.register_memory(landing)

        def describe(base: int, device: int) -> Any:
            rows = [(base + offset, size, device) for offset in offsets]
            return agent.get_xfer_descs(np.array(rows, dtype=np.uint64), connector.kind)

        read = self._post(
            lambda: agent.initialize_xfer(
                "READ",
                describe(landing.data_ptr(), connector.device_index),
                describe(geometry.scratch_address, geometry.device_index),
                self.peer.name,
            ),
            registration,
        )
        spins_until_at = read.posted_at + _TIMED_SPIN_S
        while (
            connector.kind == "VRAM"
            and read.poll() == "pending"
            and time.perf_counter() < spins_until_at
        ):
            continue
        return read, landing

    def close(self) -> None:
        for prepared in self.pieces:
            self.connector.quietly(prepared.release)
        # NIXL takes no second agent of a name: the peer could not be connected again.
        self.connector.quietly(lambda: self.connector.agent.remove_remote_agent(self.peer.name))

    def _post(self, make: Callable[[], Any], registration: Any = None) -> _NixlRead:
        """Make a READ and start it; ``registration`` is that of memory which it alone uses."""
        connector, read = self.connector, _NixlRead(self.connector, None, registration)
        try:
            read.handle = make()
            read.posted_at = time.perf_counter()
            read.state = connector.agent.transfer(read.handle)
            read.ended_at = time.perf_counter()
        except connector.backend_errors as error:
            read.release()
            raise TransferError(f"READ from {self.peer.name} was refused: {error}") from error
        return read


@dataclass(slots=True, eq=False)
class _NixlRead(Read):
    connector: NixlConnector
    handle: Any
    registration: Any  # memory of a scratch READ
    state: str = "PROC"
    posted_at: float = 0.0
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "PROC":
            try:
                # DONE is no proof: NIXL 1.5.1 says it of READs of deregistered memory and, between
                # GPUs, of those whose peer was killed. Leases and checksums decide what counts.
                self.state = str(self.connector.agent.check_xfer_state(self.handle))
            except self.connector.backend_errors:
                self.state = "ERR"
            self.ended_at = time.perf_counter()
        if self.state == "PROC":
            return "pending"
        return "done" if self.state == "DONE" else "failed"

    def seconds(self) -> float:
        return self.ended_at - self.posted_at

    def release(self) -> None:
        if self.handle is not None:
            self.connector.quietly(self.handle.release)
        if self.registration is not None:
            agent = self.connector.agent
            self.connector.quietly(lambda: agent.deregister_memory(self.registration))


def _binding_errors(bindings: Any) -> tuple[type[Exception], ...]:
    return tuple(
        kind
        for kind in vars(bindings).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    )


def _indices(blocks: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(blocks, dtype=np.int32)


def _head_indices(blocks: Sequence[int], num_heads: int, heads: range) -> npt.NDArray[np.int32]:
    return _indices([block * num_heads + head for block in blocks for head in heads])


def _try(device: str | None) -> str:
    """Try NIXL as a rank uses it: import, backend, registration of memory. Without a device only
    the import is tried.

    ``python -P -m pdlaunch.transfer.connectors.nixl [cpu|cuda:N]`` prints ``imported`` and, after
    what UCX has to say, what this returns: ``ok``, ``import: WHY`` or ``refused: WHY``.
    """
    try:
        api, bindings = load_nixl()
    except Exception as error:
        return f"import: {type(error).__name__}: {error}"
    _say("imported")
    if device is not None:
        try:
            memory = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
            agent = new_agent(api, bindings, "pdlaunch-trial", memory_kind(memory)[0])
            agent.register_memory(memory)
        except Exception as error:
            return f"refused: {type(error).__name__}: {error}"
    return "ok"


def _say(text: str) -> None:
    sys.stdout.write(" ".join(text.split()) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _say(_try(sys.argv[1] if len(sys.argv) > 1 else None))
    # UCX's own end of a process may crash it.
    os._exit(0)
