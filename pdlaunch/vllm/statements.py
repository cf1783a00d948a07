"""Keeps what prefill workers state about their blocks where decode workers of this host read it.

A statement is a file in a folder that only this user can open. It is written before the prefill
engine answers, and removed before blocks are freed whose lease has expired. So whoever finds it
after his READ has ended knows that the blocks were under lease until then::

    prefill   prompt computed, hashed ─ write ─ answer ──────────── expired? remove ─ free blocks
    decode                                      READ ─ ended ─ find ─ compare
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

VERSION = 1
KEPT_S = 60.0  # time by which a statement outlives the READ of its blocks, which ends their lease
_SWEEP_S = 1.0

ChecksumArray = npt.NDArray[np.uint64]  # [num_blocks, num_heads]


@dataclass(frozen=True, slots=True)
class Statement:
    token_hash: str
    block_ids: tuple[int, ...]
    first_head: int  # index, among all KV heads of the model, of the rank's first one
    algorithm: str
    checksums: ChecksumArray

    def encode(self) -> bytes:
        head = {
            "version": VERSION,
            "token_hash": self.token_hash,
            "block_ids": self.block_ids,
            "first_head": self.first_head,
            "algorithm": self.algorithm,
            "shape": self.checksums.shape,
        }
        return json.dumps(head).encode() + b"\n" + self.checksums.tobytes()

    @classmethod
    def decode(cls, content: bytes) -> Statement:
        line, _, body = content.partition(b"\n")
        try:
            head = json.loads(line)
            if head["version"] != VERSION:
                raise ValueError(f"statement of version {head['version']}, not {VERSION}")
            return cls(
                token_hash=head["token_hash"],
                block_ids=tuple(head["block_ids"]),
                first_head=head["first_head"],
                algorithm=head["algorithm"],
                checksums=np.frombuffer(body, dtype=np.uint64).reshape(head["shape"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a statement: {error!r}") from error


class StatementBoard:
    """Reads and writes statements in one folder; the writer's are removed by ``sweep``."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._own: dict[str, Path] = {}
        # When this engine noticed the end of the leases of its own statements.
        self._ended_at: dict[str, float] = {}
        self._next_sweep_at = 0.0

    def state(self, engine_id: str, tp_rank: int, request_id: str, statement: Statement) -> None:
        """Write a statement, whole or not at all; it replaces an earlier one."""
        path = self._path(engine_id, tp_rank, request_id)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(statement.encode())
        new.replace(path)
        self._own[request_id] = path
        self._ended_at.pop(request_id, None)

    def find(self, engine_id: str, tp_rank: int, request_id: str) -> Statement | None:
        """Return a statement; None when there is none (any more), or it cannot be read."""
        try:
            return Statement.decode(self._path(engine_id, tp_rank, request_id).read_bytes())
        except (OSError, ValueError):
            return None

    def withdraw(self, request_id: str) -> None:
        self._ended_at.pop(request_id, None)
        path = self._own.pop(request_id, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def sweep(self, leased: Collection[str]) -> None:
        """Remove own statements whose requests left ``leased`` more than KEPT_S ago."""
        now_at = self._clock()
        if now_at < self._next_sweep_at:
            return
        self._next_sweep_at = now_at + _SWEEP_S
        for request_id in tuple(self._own):
            if request_id in leased:
                self._ended_at.pop(request_id, None)
            elif self._ended_at.setdefault(request_id, now_at) + KEPT_S < now_at:
                self.withdraw(request_id)

    def close(self) -> None:
        for request_id in tuple(self._own):
            with contextlib.suppress(OSError):
                self.withdraw(request_id)

    def _path(self, engine_id: str, tp_rank: int, request_id: str) -> Path:
        return self._folder / statement_name(engine_id, tp_rank, request_id)


def statement_name(engine_id: str, tp_rank: int, request_id: str) -> str:
    """Return the name of a statement's file."""
    # Clients choose a part of request ids, and they come back from outside.
    name = hashlib.sha256(json.dumps([engine_id, tp_rank, request_id]).encode())
    return name.hexdigest()[:40]


def token_hash(token_ids: Sequence[int], context: Sequence[str] = ()) -> str:
    """Return a hash of a prompt; ``context`` is what its KV depends on beside its tokens."""
    digest = hashlib.sha256(json.dumps([len(token_ids), *context]).encode())
    digest.update(np.asarray(token_ids, dtype="<i8").tobytes())
    return digest.hexdigest()
