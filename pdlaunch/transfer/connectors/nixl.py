"""Moves KV blocks over NIXL with its UCX backend.

Each READ describes its own pieces, neighbours merged, by address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from pdlaunch.errors import TransferError
from pdlaunch.machine import network
from pdlaunch.machine.ucx_log import ReadTransports, path_over
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
    bind_device,
    memory_kind,
    pieces_of_scratch,
    pieces_to_read,
)
from pdlaunch.transfer.regions import Addresses, Pieces, merge

logger = logging.getLogger(__name__)

BACKEND = "UCX"
# Transports to other hosts, as pdlaunch names them in UCX_TLS.
_TO_HOSTS = frozenset(("tcp", "rc_verbs", "rc_mlx5"))
_DEVICES = "UCX_NET_DEVICES"
_MEMORY_NAMES = {"DRAM": "host memory", "VRAM": "GPU memory"}
# Sleep of UCX's progress thread when no event wakes it; NIXL's Python API spins on a core.
_PROGRESS_INTERVAL_US = {"DRAM": 100_000, "VRAM": 1_000}
# How long a timed READ between GPUs is polled without sleeping, in seconds: a sleep would take
# longer than the READ.
_TIMED_SPIN_S = 0.002


def load_nixl() -> tuple[Any, Any]:
    """Return NIXL's Python API and C++ bindings. The import takes seconds and reads variables."""
    # The package nixl picks the build for PyTorch's CUDA itself; pdlaunch installs just one build.
    major = (torch.version.cuda or "13").split(".")[0]
    name = "nixl" if find_spec("nixl") else f"nixl_cu{major}"
    return import_module(f"{name}._api"), import_module(f"{name}._bindings")


def new_agent(api: Any, bindings: Any, name: str, interval_us: int) -> Any:
    """Make an agent like ``nixl_agent``; it listens only if UCX_TLS names the network.

    With error handling, UCX needs a transport that listens on TCP, where it takes writes to any
    address from anybody. If UCX_TLS names local transports alone, error handling is off: nobody
    listens, and nobody learns of a peer's death. If UCX_TLS names a network, the user trusts that
    network, and error handling is on.
    """
    # The wrapper is made without a backend and given an agent of its own below: the one that it
    # makes has a progress thread that never sleeps.
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    config.pthrDelay = interval_us
    config.captureTelemetry = False
    agent.agent = bindings.nixlAgent(name, config)
    is_open = not _TO_HOSTS.isdisjoint(os.environ.get("UCX_TLS", "").split(","))
    agent.create_backend(BACKEND, {"ucx_error_handling_mode": "peer" if is_open else "none"})
    return agent


class NixlConnector(Connector):
    """Reads through one NIXL agent. ``open`` loads the library, with the variables of
    ``NixlSpec.environment`` applied.

    The bindings raise exceptions of their own, which become TransferErrors here.
    """

    name = "nixl"
    path = f"nixl/{BACKEND}"

    def __init__(
        self, name: str, incarnation: int, load: Callable[[], tuple[Any, Any]] = load_nixl
    ) -> None:
        """``name`` is the rank's, ``prefill-0/rank-0``."""
        self.agent_name = f"{name}#{incarnation}"
        # Outlives ``close``, as READs may be pending at the exit; ``open`` lets go of it.
        self.agent: Any = None
        self._load = load

    def open(self, memory: LocalMemory) -> None:
        self.kind, self.device_index = memory_kind(memory.scratch)
        self.memory = memory  # registered memory must not be freed
        bind_device(memory.scratch.device)  # UCX takes the context that is current
        _choose_devices()
        before = network.listeners()
        self.transports = ReadTransports()
        try:
            # NIXL never closes the endpoint of an agent that is removed, which is a socket on both
            # sides; a new agent has none.
            self.agent = None
            api, bindings = self._load()
            interval_us = _PROGRESS_INTERVAL_US[self.kind]
            self.agent = new_agent(api, bindings, self.agent_name, interval_us)
            self._registrations = [
                self.agent.register_memory(tensor)
                for tensor in (*memory.kv.allocations, memory.scratch)
            ]
            self._metadata: bytes = self.agent.get_agent_metadata()
        except Exception as error:
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

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        geometry = peer.geometry
        if geometry.memory_kind != self.kind:
            raise TransferError(
                f"the KV cache of {peer.agent_name} is in {_MEMORY_NAMES[geometry.memory_kind]}, "
                f"that of {self.agent_name} in {_MEMORY_NAMES[self.kind]}; NIXL is used between "
                "equal ones only (device)"
            )
        try:
            added = self.agent.add_remote_agent(peer.agent_metadata)
        except Exception as error:
            raise TransferError(f"agent {peer.agent_name} cannot be added: {error}") from error
        name = added.decode() if isinstance(added, bytes) else str(added)
        if name != peer.agent_name:
            quietly(self.agent.remove_remote_agent, name)
            raise TransferError(f"the metadata of agent {peer.agent_name} is that of {name}")
        return {self.path: _NixlConnection(self, peer)}

    def close(self) -> None:
        for registration in self._registrations:
            quietly(self.agent.deregister_memory, registration)
        del self.memory


@dataclass(frozen=True, slots=True, eq=False)
class _NixlConnection(Connection):
    connector: NixlConnector
    peer: HandshakeReply

    def read(self, blocks: BlockRead) -> Read:
        return self._post(*pieces_to_read(self.connector.memory, self.peer, blocks))

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        connector = self.connector
        read = self._post(*pieces_of_scratch(landing, self.peer, piece_bytes), landing)
        spins_until_at = read.posted_at + _TIMED_SPIN_S
        while (
            connector.kind == "VRAM"
            and read.poll() == "pending"
            and time.perf_counter() < spins_until_at
        ):
            continue
        return read

    def named(self, path: str) -> str:
        return path_over(path, self.connector.transports.latest())

    def close(self) -> None:
        # NIXL takes no second agent of a name: the peer could not be connected again.
        quietly(self.connector.agent.remove_remote_agent, self.peer.agent_name)

    def _post(self, ours: Pieces, theirs: Pieces, landing: torch.Tensor | None = None) -> _NixlRead:
        """Start a READ; ``landing`` is memory that it alone uses, not registered yet."""
        connector, agent, geometry = self.connector, self.connector.agent, self.peer.geometry
        to, of, sizes = merge(ours, theirs)

        def describe(addresses: Addresses, device: int) -> Any:
            rows = np.stack((addresses, sizes, np.full_like(sizes, device)), axis=1)
            return agent.get_xfer_descs(rows, connector.kind)

        read = _NixlRead(agent)
        try:
            if landing is not None:
                read.registration = agent.register_memory(landing)
            read.handle = agent.initialize_xfer(
                "READ",
                describe(to, connector.device_index),
                describe(of, geometry.device_index),
                self.peer.agent_name,
            )
            read.posted_at = time.perf_counter()
            read.state = agent.transfer(read.handle)
            read.ended_at = time.perf_counter()
        except Exception as error:
            read.release()
            raise TransferError(f"READ from {self.peer.agent_name} was refused: {error}") from error
        return read


@dataclass(slots=True, eq=False)
class _NixlRead(Read):
    agent: Any
    registration: Any = None  # memory of a scratch READ
    handle: Any = None
    state: str = "PROC"
    posted_at: float = 0.0
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "PROC":
            try:
                # DONE is no proof: NIXL 1.5.1 says it of READs of deregistered memory and, between
                # GPUs, of those whose peer was killed. Leases and checksums decide what counts.
                self.state = str(self.agent.check_xfer_state(self.handle))
            except Exception:
                self.state = "ERR"
            self.ended_at = time.perf_counter()
        if self.state == "PROC":
            return "pending"
        return "done" if self.state == "DONE" else "failed"

    def seconds(self) -> float:
        return self.ended_at - self.posted_at

    def release(self) -> None:
        if self.handle is not None:
            quietly(self.handle.release)
        if self.registration is not None:
            quietly(self.agent.deregister_memory, self.registration)


def quietly(act: Callable[..., object], *arguments: object) -> None:
    """Call ``act`` and ignore a refusal: backends refuse to release what has failed already."""
    with contextlib.suppress(Exception):
        act(*arguments)


def _choose_devices() -> None:
    """Put the name of the network device in the place of its address, which is all that the
    supervisor knows of another host. Before ``load_nixl``. Raises TransferError.
    """
    try:
        devices = network.with_device_names(os.environ.get(_DEVICES, ""))
    except LookupError as error:
        raise TransferError(str(error)) from None
    if devices:
        os.environ[_DEVICES] = devices
