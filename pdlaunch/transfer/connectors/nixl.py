"""Moves KV blocks over NIXL with its UCX backend, over P2P, or over the faster of both.

Each READ of NIXL lists the addresses of its pieces, after neighbouring pieces are merged.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np
import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
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
    decode_metadata,
    memory_kind,
    pieces_of_scratch,
    pieces_to_read,
)
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.regions import Addresses, Pieces, merge

logger = logging.getLogger(__name__)

BACKEND = "UCX"
# Transports to other hosts, as pdlaunch names them in UCX_TLS.
_TO_HOSTS = frozenset(("tcp", "rc_verbs", "rc_mlx5"))
_DEVICES = "UCX_NET_DEVICES"
_MEMORY_NAMES = {"DRAM": "host memory", "VRAM": "GPU memory"}
# How long UCX's progress thread sleeps if no event wakes it; with NIXL's default it never sleeps.
_PROGRESS_INTERVAL_US = {"DRAM": 100_000, "VRAM": 1_000}
# How long a timed READ between GPUs is polled without sleep, in seconds: a sleep would take longer
# than the READ.
_TIMED_SPIN_S = 0.002


def load_nixl() -> tuple[Any, Any]:
    """Return NIXL's Python API and C++ bindings. The import takes seconds and reads UCX_*."""
    # If the package nixl is there, it picks the build for PyTorch's CUDA. Otherwise, pick it here.
    major = (torch.version.cuda or "13").split(".")[0]
    name = "nixl" if find_spec("nixl") else f"nixl_cu{major}"
    return import_module(f"{name}._api"), import_module(f"{name}._bindings")


def new_agent(api: Any, bindings: Any, name: str, interval_us: int) -> Any:
    """Make an agent like ``nixl_agent`` does; it listens only if UCX_TLS names a network. With
    error handling, UCX needs a transport that listens on TCP, and there accepts writes to any
    address from any process. So it is on only if UCX_TLS names a network transport, which the user
    trusts; otherwise UCX does not notice a peer's death.
    """
    # Make the wrapper without a backend and replace its agent below, because the progress thread of
    # the wrapper's own agent never sleeps.
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
    """Reads with one NIXL agent. ``open`` loads the library; the caller has set the variables of
    ``NixlSpec.environment``. The exceptions of the bindings become TransferErrors here.
    """

    name = "nixl"
    path = f"nixl/{BACKEND}"

    def __init__(
        self, name: str, incarnation: int, load: Callable[[], tuple[Any, Any]] = load_nixl
    ) -> None:
        """``name``: of the rank, ``prefill-0/rank-0``."""
        self.agent_name = f"{name}#{incarnation}"
        # Stays after ``close``, because READs may be pending at the exit; ``open`` replaces it.
        self.agent: Any = None
        self._load = load

    def open(self, memory: LocalMemory) -> None:
        self.kind, self.device_index = memory_kind(memory.scratch)
        self.memory = memory  # registered memory must not be freed
        bind_device(memory.scratch.device)  # UCX uses the current CUDA context
        try:
            # The supervisor knows only addresses of other hosts. Before NIXL is loaded.
            devices = network.with_device_names(os.environ.get(_DEVICES, ""))
        except LookupError as error:
            raise TransferError(str(error)) from None
        if devices:
            os.environ[_DEVICES] = devices
        before = network.listeners()
        self.transports = ReadTransports()
        try:
            # Drop the old agent: NIXL never closes the endpoints to removed remote agents, which
            # hold a socket on both sides.
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
                "listens for READs of KV blocks at %s:%d (%s), over UCX_TLS %s: any process that "
                "reaches it can read and write this process (kv_transfer.trusted_network)",
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
                f"the KV cache of {self.agent_name} in {_MEMORY_NAMES[self.kind]}; NIXL needs the "
                "same kind on both sides (device)"
            )
        try:
            added = self.agent.add_remote_agent(peer.agent_metadata)
        except Exception as error:
            raise TransferError(f"agent {peer.agent_name} cannot be added: {error}") from error
        name = added.decode() if isinstance(added, bytes) else str(added)
        if name != peer.agent_name:
            quietly(self.agent.remove_remote_agent, name)
            raise TransferError(f"agent {peer.agent_name} sent the metadata of {name}")
        return {self.path: _NixlConnection(self, peer)}

    def close(self) -> None:
        for registration in self._registrations:
            quietly(self.agent.deregister_memory, registration)
        del self.memory


@dataclass(slots=True, eq=False)
class _NixlRead(Read):
    agent: Any
    registration: Any = None  # of ``landing``
    handle: Any = None
    state: str = "PROC"
    posted_at: float = 0.0
    ended_at: float = 0.0

    def poll(self) -> ReadState:
        if self.state == "PROC":
            try:
                # DONE does not prove the bytes: NIXL 1.5.1 reports it for READs of deregistered
                # memory, and between GPUs even if the peer was killed. Leases and checksums do.
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
        # Without this, the peer could not connect again: NIXL refuses a second agent of a name.
        quietly(self.connector.agent.remove_remote_agent, self.peer.agent_name)

    def _post(self, ours: Pieces, theirs: Pieces, landing: torch.Tensor | None = None) -> _NixlRead:
        """Start a READ. ``landing``: memory to register for this READ; None for the KV cache."""
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


def quietly(act: Callable[..., object], *arguments: object) -> None:
    """Call ``act`` and ignore exceptions: backends refuse to release a failed transfer."""
    with contextlib.suppress(Exception):
        act(*arguments)


# Connector name -> its metadata, and the error if it did not open.
Offers = dict[str, tuple[bytes, str]]


class PathsConnector(Connector):
    """Joins connectors; the handshake measures their paths to a peer and uses the fastest. At least
    one must open. A path that does not open, or does not reach a peer, has an error in place of a
    connection.
    """

    def __init__(self, connectors: Sequence[Connector]) -> None:
        """``connectors``: of one rank, the preferred connector last. None of them pushes."""
        self._connectors = connectors
        self.name = "+".join(connector.name for connector in connectors)
        self.path = " or ".join(connector.path for connector in connectors)
        self.agent_name = connectors[0].agent_name
        self._offers: Offers = {}

    def open(self, memory: LocalMemory) -> None:
        self._offers = {}
        for connector in self._connectors:
            try:
                connector.open(memory)
                self._offers[connector.name] = connector.agent_metadata(), ""
            except TransferError as error:
                logger.info("no path %s: %s", connector.path, error)
                self._offers[connector.name] = b"", str(error)
        errors = [error for _, error in self._offers.values()]
        if all(errors):
            raise TransferError("; ".join(errors))

    def agent_metadata(self) -> bytes:
        return msgspec.msgpack.encode(self._offers)

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection | TransferError]:
        offers = decode_metadata(peer, Offers)
        found: dict[str, Connection | TransferError] = {}
        # Connectors have the preferred one last, paths have it first.
        for connector in reversed(self._connectors):
            _, own_error = self._offers[connector.name]
            metadata, their_error = offers.get(connector.name, (b"", "the peer does not offer it"))
            try:
                if reason := own_error or their_error:
                    raise TransferError(reason)
                found |= connector.connect(msgspec.structs.replace(peer, agent_metadata=metadata))
            except TransferError as failure:
                # A new exception: the frames in its traceback would keep the connections alive.
                found[connector.path] = TransferError(str(failure))
        return found

    def close(self) -> None:
        for connector in self._connectors:
            if not self._offers[connector.name][1]:
                connector.close()

    def wait_unmapped(self, timeout_s: float) -> bool:
        return all(connector.wait_unmapped(timeout_s) for connector in self._connectors)


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make a rank's connector for ``connector: nixl``, with the paths in ``nixl.path``."""
    match settings.nixl.path:
        case "nixl":
            return NixlConnector(name, incarnation)
        case "p2p":
            return P2PConnector(name, incarnation)
        case "auto":
            nixl, p2p = NixlConnector(name, incarnation), P2PConnector(name, incarnation)
            return PathsConnector([nixl, p2p])
