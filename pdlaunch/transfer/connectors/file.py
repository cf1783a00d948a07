"""Moves KV blocks through files in a shared folder, for debugging and offline runs.

The prefill side writes a file and the decode side loads it. Only the decode rank itself writes to
its memory, so a READ whose prefill side has failed or died is over at once.

The shared folder has one folder a prompt, named by its digest, with one safetensors file a READ in
it. Files appear whole or not at all, names cannot leave the folder, and when it grows too big the
oldest prompts are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    LocalMemory,
    PeerAgent,
    PushJob,
    ReadState,
)
from pdlaunch.transfer.connectors.pushing import PendingRead, PushingConnector, parse_agent_metadata

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32,128}/[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TENSOR = "blocks"


class FileConnector(PushingConnector):
    """Writes and reads safetensors files."""

    name = "file"
    path = "file/safetensors"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        directory: str,
        size_limit_bytes: int,
        num_sender_threads: int,
    ) -> None:
        """``directory`` is shared by all engines, and theirs alone."""
        super().__init__(name, incarnation, num_sender_threads=num_sender_threads)
        self._directory = directory
        self._size_limit_bytes = size_limit_bytes

    def agent_metadata(self) -> bytes:
        return b"file"

    def connect(self, peer: PeerAgent) -> Connection:
        parse_agent_metadata(peer)
        return _FileConnection(self, peer)

    def _start(self, memory: LocalMemory) -> None:
        self.store = FileStore(self._directory, self._size_limit_bytes)

    def _stop(self) -> None:
        """Leave the files: they are there to be looked at."""

    def _write(self, memory: LocalMemory, job: PushJob) -> None:
        if job.blocks:
            kv_cache = memory.kv_cache
            blocks = torch.tensor(job.blocks, device=kv_cache.device)
            data = kv_cache[:, job.heads.start : job.heads.stop].index_select(0, blocks).cpu()
        else:
            data = memory.scratch.cpu()
        self.store.write(job.target.decode("ascii", "replace"), data)

    def settle(self, read: PendingRead) -> ReadState:
        """Load what the prefill side has written. What cannot be loaded, or does not fit, is a
        failed READ.
        """
        if read.error:
            return "failed"
        try:
            self._load(read)
        except TransferError as error:
            logger.warning("%s", error)
            return "failed"
        return "done"

    def _load(self, read: PendingRead) -> None:
        name, kv_cache = read.target.decode(), self.memory.kv_cache
        found = self.store.read(name, kv_cache.device)
        if read.blocks is None:
            assert read.landing is not None
            _check_fits(name, found, read.landing)
            read.landing.copy_(found)
            _await_device(read.landing)
            return
        heads = read.blocks.local_heads
        blocks = torch.tensor(read.blocks.local_blocks, device=kv_cache.device)
        share = kv_cache[:, heads.start : heads.stop]
        _check_fits(name, found, share, len(blocks))
        share.index_copy_(0, blocks, found)
        _await_device(kv_cache)


@dataclass(frozen=True, slots=True)
class _FileConnection(Connection):
    connector: FileConnector
    peer: PeerAgent

    def paths(self) -> Sequence[str]:
        return (FileConnector.path,)

    def read(self, blocks: BlockRead) -> PendingRead:
        """Wait for the file that the prefill side is asked to write."""
        name = file_name(blocks.digest, f"{self.peer.name} {blocks.reader}")
        return PendingRead(name.encode(), self.connector.settle, blocks)

    def read_scratch(self, path: str) -> tuple[PendingRead, torch.Tensor]:
        """Wait for the peer's scratch in a file that ``release`` removes."""
        landing = self.connector.new_landing(self.peer.geometry.scratch_bytes)
        name = file_name(secrets.token_hex(16), self.connector.agent_name)
        remove = partial(self.connector.store.remove, name)
        settle = self.connector.settle
        return PendingRead(name.encode(), settle, None, landing, remove), landing


def _await_device(memory: torch.Tensor) -> None:
    """Wait until the writes are visible to every stream."""
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def _check_fits(
    name: str, found: torch.Tensor, wanted: torch.Tensor, num_rows: int | None = None
) -> None:
    shape = (wanted.shape[0] if num_rows is None else num_rows, *wanted.shape[1:])
    if (tuple(found.shape), found.dtype) != (shape, wanted.dtype):
        raise TransferError(
            f"{name} holds {found.dtype} {tuple(found.shape)}, wanted are {wanted.dtype} {shape}"
        )


def file_name(digest: str, purpose: str) -> str:
    """Return ``<digest>/<digest of the purpose>``. ``digest`` has 32 to 128 hexadecimal digits;
    ``purpose`` names one prefill rank's share of one READ.
    """
    return f"{digest}/{hashlib.sha256(purpose.encode()).hexdigest()}"


class FileStore:
    """Keeps files under one folder. Several processes may use it at once."""

    def __init__(self, folder: str, size_limit_bytes: int) -> None:
        """Create the folder. Raises TransferError."""
        self._size_limit_bytes = size_limit_bytes
        self._folder = Path(folder)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = self._folder.resolve(strict=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise TransferError(
                f"kv_transfer.file.directory {folder} cannot be written to: {error}"
            ) from error

    def write(self, name: str, blocks: torch.Tensor) -> None:
        """Write ``blocks``, which are contiguous and on the host, then delete the oldest files
        beyond the limit. Raises TransferError.
        """
        num_bytes = blocks.numel() * blocks.element_size()
        if num_bytes > self._size_limit_bytes:
            raise TransferError(
                f"{num_bytes} bytes do not fit into kv_transfer.file.directory: size_limit is "
                f"{self._size_limit_bytes}"
            )
        path = self._path(name)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_inside(path.parent)
            save_file({_TENSOR: blocks}, part)
            part.replace(path)
            os.utime(path.parent)
            self._prune(keep=path.parent)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise TransferError(f"{path} cannot be written: {error}") from error

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Load a file straight to ``device``. Raises TransferError."""
        path = self._path(name)
        try:
            self._check_inside(path.parent)
            with safe_open(path, framework="pt", device=str(device)) as file:
                blocks: torch.Tensor = file.get_tensor(_TENSOR)
        except (OSError, SafetensorError) as error:
            raise TransferError(f"{path} cannot be read: {error}") from error
        return blocks

    def remove(self, name: str) -> None:
        """Delete a file, and its folder when that is empty then. Never raises."""
        path = self._path(name)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()

    def _path(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise TransferError(f"{name[:200]!r} is no name of a file of KV blocks")
        return self._folder / f"{name}{_SUFFIX}"

    def _check_inside(self, folder: Path) -> None:
        """Refuse links that lead out of the folder."""
        if folder.resolve().parent != self._folder:
            raise TransferError(f"{folder} leads out of {self._folder}")

    def _prune(self, keep: Path) -> None:
        found = []
        for folder in self._folder.iterdir():
            # Another process may delete it, or a file in it, meanwhile.
            with contextlib.suppress(OSError):
                if not folder.is_symlink() and folder.is_dir():
                    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
                    found.append((folder.stat().st_mtime, num_bytes, folder))
        excess = sum(num_bytes for _, num_bytes, _ in found) - self._size_limit_bytes
        for _, num_bytes, folder in sorted(found):
            if excess > 0 and folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= num_bytes


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> FileConnector:
    """Make the connector of a rank from its settings."""
    section = settings.file
    assert section.directory is not None, "checked by KVTransferSettings"
    return FileConnector(
        name,
        incarnation,
        directory=section.directory,
        size_limit_bytes=section.size_limit,
        num_sender_threads=section.num_sender_threads,
    )
