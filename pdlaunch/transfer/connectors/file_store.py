"""The shared folder of the file connector: one folder a prompt, named by its digest, with one
safetensors file a READ in it.

Files appear whole or not at all, names cannot leave the folder, and when it grows too big the
oldest prompts are deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pdlaunch.errors import TransferError

_NAME = re.compile(r"[0-9a-f]{32,128}/[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TENSOR = "blocks"


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
        try:
            path.unlink(missing_ok=True)
            path.parent.rmdir()
        except OSError:
            return

    def _path(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise TransferError(f"{name[:200]!r} is no name of a file of KV blocks")
        return self._folder / f"{name}{_SUFFIX}"

    def _check_inside(self, folder: Path) -> None:
        """Refuse links that lead out of the folder."""
        if folder.resolve().parent != self._folder:
            raise TransferError(f"{folder} leads out of {self._folder}")

    def _prune(self, keep: Path) -> None:
        sizes = {}
        for folder in self._folder.iterdir():
            if not folder.is_symlink() and folder.is_dir():
                sizes[folder] = (_written_s(folder), _folder_bytes(folder))
        excess = sum(size for _, size in sizes.values()) - self._size_limit_bytes
        for folder, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if excess <= 0:
                return
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size


def _folder_bytes(folder: Path) -> int:
    """Return the bytes of a prompt's folder; 0 when another process has deleted it meanwhile."""
    try:
        return sum(_size_bytes(path) for path in folder.iterdir())
    except OSError:
        return 0


def _size_bytes(path: Path) -> int:
    """Return a file's bytes; 0 when another process has deleted it meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _written_s(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
