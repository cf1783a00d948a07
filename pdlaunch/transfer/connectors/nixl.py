"""Moves KV blocks over NIXL with its UCX backend.

Descriptors of the KV cache are prepared once for each side: one for each block, and one for each
(block, head) for peers with other heads. A READ then names indices only, and NIXL merges
neighbours.
"""

from __future__ import annotations

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
        self._load = load
        self._backend_errors: tuple[type[Exception], ...] = _PYTHON_ERRORS
        self._agent: Any = None
        """Outlives ``close``, because READs may be pending when the process exits; ``open`` lets go
        of it.
        """

    def open(self, memory: LocalMemory) -> None:
        self._kind, self._device_index = memory_kind(memory.kv_cache)
        self._num_heads = memory.layout.num_kv_heads
        self._memory = memory  # registered memory must not be freed
        if self._kind == "VRAM":
            torch.cuda.set_device(
                self._device_index
            )  # of this thread: UCX takes the context that is current
        choose_devices(os.environ)
        before = network.listeners()
        try:
            # NIXL never closes the endpoint of an agent that is removed, which is a socket on both
            # sides; a new agent has none.
            self._agent = None
            self._agent = self._make_agent()
            self._registrations = [
                self._agent.register_memory(tensor) for tensor in (memory.kv_cache, memory.scratch)
            ]
            self._metadata: bytes = self._agent.get_agent_metadata()
            base, num_blocks = memory.kv_cache.data_ptr(), memory.kv_cache.shape[0]
            layout = memory.layout
            self._local_blocks = self._prepare(
                "", base, layout.block_bytes, num_blocks, self._device_index
            )
            self._local_heads = self._prepare(
                "", base, layout.head_bytes, num_blocks * layout.num_kv_heads, self._device_index
            )
        except self._backend_errors as error:
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
        if peer.geometry.memory_kind != self._kind:
            raise TransferError(
                f"the KV cache of {peer.name} is in {_MEMORY_NAMES[peer.geometry.memory_kind]}, "
                f"that of {self.agent_name} in {_MEMORY_NAMES[self._kind]}; NIXL is used between "
                "equal ones only (device)"
            )
        try:
            name = self._agent.add_remote_agent(peer.metadata)
        except self._backend_errors as error:
            raise TransferError(f"agent {peer.name} cannot be added: {error}") from error
        found = name.decode() if isinstance(name, bytes) else str(name)
        if found != peer.name:
            self._forget(found)
            raise TransferError(f"the metadata of agent {peer.name} is that of {found}")
        try:
            return self._describe_peer(peer)
        except self._backend_errors as error:
            self._forget(found)
            raise TransferError(f"agent {peer.name} cannot be read: {error}") from error

    def disconnect(self, connection: _NixlConnection) -> None:
        """Forget a peer. Never raises."""
        for prepared in (connection.blocks, connection.heads):
            self._quietly(prepared.release)
        # NIXL takes no second agent of a name: the peer could not be connected again.
        self._forget(connection.peer.name)

    def read(self, connection: _NixlConnection, blocks: BlockRead) -> Read:
        """Start the READ of a connection; see ``Connection.read``."""
        remote_num_heads = connection.peer.geometry.num_kv_heads
        whole_blocks = len(blocks.local_heads) == self._num_heads == remote_num_heads
        if whole_blocks:
            local, remote = _indices(blocks.local_blocks), _indices(blocks.remote_blocks)
            sides = self._local_blocks, connection.blocks
        else:
            local = _head_indices(blocks.local_blocks, self._num_heads, blocks.local_heads)
            remote = _head_indices(blocks.remote_blocks, remote_num_heads, blocks.remote_heads)
            sides = self._local_heads, connection.heads
        try:
            handle = self._agent.make_prepped_xfer("READ", sides[0], local, sides[1], remote)
        except self._backend_errors as error:
            raise TransferError(f"READ from {connection.peer.name} was refused: {error}") from error
        return self._post(connection.peer.name, _NixlRead(self, handle))

    def read_scratch(self, peer: PeerAgent) -> tuple[Read, torch.Tensor]:
        """Start to read a peer's scratch; see ``Connection.read_scratch``."""
        geometry = peer.geometry
        offsets, size = piece_offsets(
            geometry.scratch_bytes, self._memory.layout.block_bytes, geometry.block_bytes
        )
        landing = new_landing(len(offsets) * size, self._memory.kv_cache.device)
        registration = self._agent.register_memory(landing)
        try:
            local = self._describe(landing.data_ptr(), offsets, size, self._device_index)
            remote = self._describe(geometry.scratch_address, offsets, size, geometry.device_index)
            handle = self._agent.initialize_xfer("READ", local, remote, peer.name)
        except self._backend_errors as error:
            self._quietly(lambda: self._agent.deregister_memory(registration))
            raise TransferError(f"READ from {peer.name} was refused: {error}") from error
        read = self._post(peer.name, _NixlRead(self, handle, registration))
        while (
            self._kind == "VRAM"
            and read.poll() == "pending"
            and time.perf_counter() < read.posted_at + _TIMED_SPIN_S
        ):
            continue
        return read, landing

    def state_of(self, handle: Any) -> str:
        """Return the state of a READ in NIXL's words: ``PROC``, ``DONE`` or ``ERR``."""
        try:
            # DONE is no proof: NIXL 1.5.1 says it of READs of deregistered memory and, between
            # GPUs, of those whose peer was killed. Leases and checksums decide what counts.
            return str(self._agent.check_xfer_state(handle))
        except self._backend_errors:
            return "ERR"

    def release(self, handle: Any, registration: Any) -> None:
        """Let go of a READ, and of the memory of a scratch READ. Never raises."""
        self._quietly(handle.release)
        if registration is not None:
            self._quietly(lambda: self._agent.deregister_memory(registration))

    def close(self) -> None:
        for prepared in (self._local_blocks, self._local_heads):
            self._quietly(prepared.release)
        for registration in self._registrations:
            self._quietly(partial(self._agent.deregister_memory, registration))
        del self._memory

    def _make_agent(self) -> Any:
        api, bindings = self._load()
        self._backend_errors = _PYTHON_ERRORS + _binding_errors(bindings)
        return new_agent(api, bindings, self.agent_name, self._kind)

    def _describe_peer(self, peer: PeerAgent) -> _NixlConnection:
        geometry = peer.geometry
        base, num_blocks, device = geometry.base_address, geometry.num_blocks, geometry.device_index
        blocks = self._prepare(peer.name, base, geometry.block_bytes, num_blocks, device)
        heads = self._prepare(
            peer.name, base, geometry.head_bytes, num_blocks * geometry.num_kv_heads, device
        )
        return _NixlConnection(self, peer, blocks, heads)

    def _prepare(
        self, agent_name: str, base: int, piece_bytes: int, count: int, device_index: int
    ) -> Any:
        # One row stands for all pieces: address, length and device of the first, distance to the
        # next, and their number.
        pieces = np.array([[base, piece_bytes, device_index, piece_bytes, count]], dtype=np.uint64)
        return self._agent.prep_xfer_dlist(agent_name, pieces, self._kind)

    def _describe(
        self, base: int, offsets: Sequence[int], num_bytes: int, device_index: int
    ) -> Any:
        pieces = np.array(
            [(base + offset, num_bytes, device_index) for offset in offsets], dtype=np.uint64
        )
        return self._agent.get_xfer_descs(pieces, self._kind)

    def _post(self, peer_name: str, read: _NixlRead) -> _NixlRead:
        read.posted_at = time.perf_counter()
        try:
            read.state = self._agent.transfer(read.handle)
            read.ended_at = time.perf_counter()
        except self._backend_errors as error:
            read.release()
            raise TransferError(f"READ from {peer_name} failed at once: {error}") from error
        return read

    def _forget(self, agent_name: str) -> None:
        self._quietly(lambda: self._agent.remove_remote_agent(agent_name))

    def _quietly(self, act: Callable[[], object]) -> None:
        """Call ``act`` and ignore a refusal: backends refuse to release what has failed already."""
        try:
            act()
        except self._backend_errors:
            return


@dataclass(frozen=True, slots=True, eq=False)
class _NixlConnection(Connection):
    connector: NixlConnector
    peer: PeerAgent
    blocks: Any
    """Prepared descriptors, one for each block."""
    heads: Any
    """Prepared descriptors, one for each (block, head)."""

    def paths(self) -> Sequence[str]:
        return (NixlConnector.path,)

    def read(self, blocks: BlockRead) -> Read:
        return self.connector.read(self, blocks)

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        return self.connector.read_scratch(self.peer)

    def close(self) -> None:
        self.connector.disconnect(self)


@dataclass(slots=True, eq=False)
class _NixlRead(Read):
    connector: NixlConnector
    handle: Any
    registration: Any = None
    """Memory of a scratch READ."""
    state: str = "PROC"
    posted_at: float = 0.0
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "PROC":
            self.state = self.connector.state_of(self.handle)
            self.ended_at = time.perf_counter()
        if self.state == "PROC":
            return "pending"
        return "done" if self.state == "DONE" else "failed"

    def seconds(self) -> float:
        return self.ended_at - self.posted_at

    def release(self) -> None:
        self.connector.release(self.handle, self.registration)


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
