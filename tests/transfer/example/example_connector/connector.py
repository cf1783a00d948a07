"""Reads the memory of another process of this host with ``process_vm_readv``."""

import ctypes
import os
import time
from collections.abc import Mapping

import torch

from example_connector import ExampleSettings
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
    pieces_to_read,
)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class _Span(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("address", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t)]


class ExampleConnector(Connector):
    name = "example"
    path = "example/process_vm_readv"

    def __init__(self, rank: str, incarnation: int, max_read_bytes: int) -> None:
        self.agent_name = f"{rank}#{incarnation}"
        self.max_read_bytes = max_read_bytes

    def open(self, memory: LocalMemory) -> None:
        if memory.scratch.device.type != "cpu":
            raise TransferError("the example reads host memory only")
        _LIBC.prctl(_PR_SET_PTRACER, _ANY)  # peers are not parents of this process
        self.memory = memory

    def agent_metadata(self) -> bytes:
        return str(os.getpid()).encode()

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        return {self.path: _Connection(self, peer, int(peer.agent_metadata))}

    def close(self) -> None:
        del self.memory


class _Connection(Connection):
    def __init__(self, connector: ExampleConnector, peer: HandshakeReply, pid: int) -> None:
        self.connector, self.peer, self.pid = connector, peer, pid

    def read(self, blocks: BlockRead) -> Read:
        to, of = pieces_to_read(self.connector.memory, self.peer, blocks)
        if to.sizes.sum() > self.connector.max_read_bytes:
            raise TransferError("longer than kv_transfer.example.max_read_bytes")
        began_at = time.perf_counter()
        for piece in zip(to.addresses, of.addresses, to.sizes, strict=True):
            self._copy(*map(int, piece))
        return _DoneRead(time.perf_counter() - began_at)

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        began_at = time.perf_counter()
        self._copy(landing.data_ptr(), self.peer.geometry.scratch_address, landing.numel())
        return _DoneRead(time.perf_counter() - began_at)

    def close(self) -> None:
        """Do nothing: the connector has no resources for a peer."""

    def _copy(self, ours: int, theirs: int, num_bytes: int) -> None:
        to, source = _Span(ours, num_bytes), _Span(theirs, num_bytes)
        copied = _LIBC.process_vm_readv(
            self.pid,
            ctypes.byref(to),
            ctypes.c_ulong(1),
            ctypes.byref(source),
            ctypes.c_ulong(1),
            0,
        )
        if copied != num_bytes:
            reason = os.strerror(ctypes.get_errno())
            raise TransferError(f"{self.peer.agent_name}: {copied} of {num_bytes} bytes: {reason}")


class _DoneRead(Read):
    """A READ that is done from the start: ``read`` blocks until all bytes are copied."""

    def __init__(self, read_s: float) -> None:
        self.read_s = read_s

    def poll(self) -> ReadState:
        return "done"

    def seconds(self) -> float:
        return self.read_s

    def release(self) -> None:
        """Do nothing: a READ has no resources."""


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> ExampleConnector:
    section = settings.section("example")
    assert isinstance(section, ExampleSettings)
    return ExampleConnector(name, incarnation, section.max_read_bytes)
