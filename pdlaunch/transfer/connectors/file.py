"""Moves KV blocks through files in a shared folder, for debugging and offline runs.

The prefill side writes a file and the decode side loads it. Only the decode rank itself writes to
its memory, so if the prefill side fails or dies, the READ has failed at once.

The shared folder contains a folder for each prompt, named by the prompt's digest, with a
safetensors file for each READ. Files are renamed into place when complete, and file names cannot
lead out of the folder. If the folder exceeds its size limit, the oldest prompts are deleted.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    LocalMemory,
    PendingRead,
    PushingConnector,
    ReadState,
)
from pdlaunch.transfer.regions import BlockIds

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{32,128}/[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TENSOR = "blocks"


class FileConnector(PushingConnector):
    name = "file"
    path = "file/safetensors"

    def __init__(self, settings: KVTransferSettings, name: str, incarnation: int) -> None:
        self._settings = settings.file
        super().__init__(name, incarnation, self._settings.num_sender_threads)

    def agent_metadata(self) -> bytes:
        return b"file"

    def expect(self, peer: HandshakeReply, blocks: BlockRead) -> PendingRead:
        views = list(self.memory.kv.views(blocks.local_blocks, blocks.local_heads))
        num_bytes = sum(view.numel() for view in views)
        settle = partial(self._settle, blocks.label, views, num_bytes)
        return PendingRead(settle, blocks.label.encode())

    def expect_scratch(self, peer: HandshakeReply, landing: torch.Tensor) -> PendingRead:
        name = f"{secrets.token_hex(16)}/{secrets.token_hex(32)}"
        settle = partial(self._settle, name, [landing], peer.geometry.scratch_bytes)
        return PendingRead(settle, name.encode(), partial(self.store.remove, name))

    def _start(self, memory: LocalMemory) -> None:
        directory = self._settings.directory
        assert directory is not None, "checked by KVTransferSettings"
        # There is no ``_stop``: the files stay, for debugging.
        self.store = FileStore(directory, self._settings.size_limit)

    def _write(self, memory: LocalMemory, target: bytes, blocks: BlockIds, heads: range) -> None:
        data = memory.scratch
        if blocks:
            data = torch.cat([view.flatten() for view in memory.kv.views(blocks, heads)])
        self.store.write(target.decode("ascii", "replace"), data.cpu())

    def _settle(
        self, name: str, views: list[torch.Tensor], num_bytes: int, error: str
    ) -> ReadState:
        """Load the prefill side's file, of ``num_bytes``, and copy its beginning to ``views``."""
        if error:
            return "failed"
        device = self.memory.scratch.device
        try:
            found = self.store.read(name, device)
            if (found.dtype, found.shape) != (torch.uint8, (num_bytes,)):
                held = f"{found.dtype} {tuple(found.shape)}"
                raise TransferError(f"the file holds {held}, expected {num_bytes} bytes")
        except TransferError as failure:
            logger.warning("%s: %s", name, failure)
            return "failed"
        sizes = [view.numel() for view in views]
        for view, part in zip(views, torch.split(found[: sum(sizes)], sizes), strict=True):
            view.copy_(part.view(view.shape))
        if device.type == "cuda":  # The bytes must be visible to every stream.
            torch.cuda.current_stream(device).synchronize()
        return "done"


class FileStore:
    """Files in one folder, which several processes may use at once."""

    def __init__(self, folder: str, size_limit_bytes: int) -> None:
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
        """Write ``blocks``, in host memory, and enforce the size limit. Raises TransferError."""
        if blocks.nbytes > self._size_limit_bytes:
            raise TransferError(
                f"{blocks.nbytes} bytes do not fit into kv_transfer.file.directory: size_limit is "
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
        path = self._path(name)
        try:
            self._check_inside(path.parent)
            with safe_open(path, framework="pt", device=str(device)) as file:
                blocks: torch.Tensor = file.get_tensor(_TENSOR)
        except (OSError, SafetensorError) as error:
            raise TransferError(f"{path} cannot be read: {error}") from error
        return blocks

    def remove(self, name: str) -> None:
        path = self._path(name)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()

    def _path(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise TransferError(f"{name[:200]!r} is not a valid name for a file of KV blocks")
        return self._folder / f"{name}{_SUFFIX}"

    def _check_inside(self, folder: Path) -> None:
        if folder.resolve().parent != self._folder:
            raise TransferError(f"{folder} leads out of {self._folder}")

    def _prune(self, keep: Path) -> None:
        found = []
        for folder in self._folder.iterdir():
            # Another process may delete the folder, or a file in it, at the same time.
            with contextlib.suppress(OSError):
                if not folder.is_symlink() and folder.is_dir():
                    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
                    found.append((folder.stat().st_mtime, num_bytes, folder))
        excess = sum(num_bytes for _, num_bytes, _ in found) - self._size_limit_bytes
        for _, num_bytes, folder in sorted(found):
            if excess > 0 and folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= num_bytes
