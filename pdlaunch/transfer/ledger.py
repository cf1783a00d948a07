"""The ledger of a rank: its living leases, in memory that peers can still read after this process
has died.

::

    | directory: NUM_ENTRIES x (offset, length, checksum) | record | free | record | ...
                                   └────────────────────────▲

The owner writes a record before anyone hears of the lease, and removes it before the engine gets
the blocks back: a record that is there when the owner has died tells of blocks that nobody has
touched since. Nobody reads before that, so there are no locks. A record counts once its entry is
whole; what was half written at the moment of death does not match its checksum and is nothing.
Source: XXH3 of the xxHash library.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Protocol

import msgspec
import xxhash

from pdlaunch.protocol.side_channel import GroupBlocks
from pdlaunch.protocol.transfer import GrantLease

LEDGER_BYTES = 16 * 1024**2
"""Leases over 50,000 blocks of 8 KV heads. Pages that were never written cost nothing."""
NUM_ENTRIES = 1024
"""Leases at once; they usually end within milliseconds."""

_ENTRY = struct.Struct("<QQQ")
DIRECTORY_BYTES = NUM_ENTRIES * _ENTRY.size
_EMPTY = bytes(_ENTRY.size)


class LedgerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a living lease says to its readers."""

    grant: GrantLease
    groups: list[GroupBlocks]
    """Blocks and checksums by group."""
    num_readers: int
    """Readers that have not had their share."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LedgerRecord)


class LedgerMemory(Protocol):
    """Bytes that peers can read: a shared mapping."""

    def __len__(self) -> int: ...

    def __setitem__(self, where: slice, data: bytes, /) -> None: ...


class Ledger:
    """The owner's side. Not thread-safe: the transfer thread owns it."""

    def __init__(self, memory: LedgerMemory) -> None:
        """``memory``: zeros."""
        self._memory = memory
        self._free_entries = list(reversed(range(NUM_ENTRIES)))
        self._entries: dict[str, int] = {}
        self._num_readers: dict[int, int] = {}
        self._spans: dict[int, range] = {}
        """Bytes of each entry's record."""

    def __len__(self) -> int:
        return len(self._entries)

    def num_readers(self, request_id: str) -> int | None:
        """Of its record; None when there is none."""
        entry = self._entries.get(request_id)
        return None if entry is None else self._num_readers[entry]

    def write(self, record: LedgerRecord) -> bool:
        """Put a lease down, in place of what was there of it. False, and nothing has changed, when
        there is no room.
        """
        request_id, payload = record.grant.request_id, _encoder.encode(record)
        entry = self._entries.get(request_id)
        offset = self._find_gap(len(payload))
        if offset is None or (entry is None and not self._free_entries):
            return False
        if entry is None:
            entry = self._entries[request_id] = self._free_entries.pop()
        self._memory[offset : offset + len(payload)] = payload
        # Last: from here on the record counts, and the one before does not.
        self._store_entry(entry, _ENTRY.pack(offset, len(payload), _checksum(offset, payload)))
        self._spans[entry] = range(offset, offset + len(payload))
        self._num_readers[entry] = record.num_readers
        return True

    def remove(self, request_id: str) -> None:
        """The lease has ended. Unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._store_entry(entry, _EMPTY)
            del self._spans[entry], self._num_readers[entry]
            self._free_entries.append(entry)

    def check_integrity(self) -> None:
        """Every entry is free or has one record; records lie apart, behind the directory. For
        tests.
        """
        assert sorted([*self._free_entries, *self._entries.values()]) == list(range(NUM_ENTRIES))
        assert self._spans.keys() == self._num_readers.keys() == set(self._entries.values())
        end = DIRECTORY_BYTES
        for span in sorted(self._spans.values(), key=lambda span: span.start):
            assert end <= span.start < span.stop <= len(self._memory)
            end = span.stop

    def _find_gap(self, num_bytes: int) -> int | None:
        """The first one that is large enough, so that few pages are ever touched."""
        start = DIRECTORY_BYTES
        for span in sorted(self._spans.values(), key=lambda span: span.start):
            if span.start - start >= num_bytes:
                return start
            start = span.stop
        return start if len(self._memory) - start >= num_bytes else None

    def _store_entry(self, entry: int, data: bytes) -> None:
        start = entry * _ENTRY.size
        self._memory[start : start + _ENTRY.size] = data


def new_ledger(num_bytes: int = LEDGER_BYTES) -> tuple[Ledger, int]:
    """An empty ledger, and a read-only file descriptor of its memory to hand to peers; the caller
    closes it.
    """
    fd = os.memfd_create("pdlaunch-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return Ledger(mmap.mmap(fd, num_bytes)), os.open(
            f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC
        )
    finally:
        os.close(fd)


def read_ledger(fd: int) -> list[LedgerRecord]:
    """The leases that lived when their owner died. ``fd``: of its ledger; the process must be dead.
    Raises OSError.
    """
    num_bytes = os.fstat(fd).st_size
    records = []
    for offset, length, checksum in _ENTRY.iter_unpack(os.pread(fd, DIRECTORY_BYTES, 0)):
        if length and offset + length <= num_bytes:
            payload = os.pread(fd, length, offset)
            if _checksum(offset, payload) == checksum:
                records.append(_decoder.decode(payload))
    return records


def _checksum(offset: int, payload: bytes) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed=offset)
