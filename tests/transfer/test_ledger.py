from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdlaunch.protocol.kv_params import FirstToken
from pdlaunch.protocol.side_channel import GroupBlocks
from pdlaunch.protocol.transfer import GrantLease
from pdlaunch.transfer.ledger import (
    DIRECTORY_BYTES,
    NUM_ENTRIES,
    Ledger,
    LedgerRecord,
    new_ledger,
    read_ledger,
)

SMALL_BYTES = DIRECTORY_BYTES + 4096


def record_of(request_id: str, *, num_blocks: int = 2, num_readers: int = 1) -> LedgerRecord:
    block_ids = list(range(3, 3 + num_blocks))
    return LedgerRecord(
        grant=GrantLease(
            request_id=request_id,
            block_ids=[block_ids],
            first_block_index=[0],
            block_hashes=[
                f"{request_id} {index}".encode().ljust(32) for index in range(num_blocks)
            ],
            num_tokens=16 * num_blocks,
            num_readers=num_readers,
            first_tokens=[FirstToken(token_id=7)],
            lease_s=30.0,
        ),
        groups=[
            GroupBlocks(
                first_block_index=0,
                block_ids=block_ids,
                checksums=(b"\xff" * 8 + bytes(8)) * num_blocks,
            )
        ],
        num_readers=num_readers,
    )


class Stores:
    """Memory of zeros that remembers every store, so that a death can be put between any two
    bytes.
    """

    def __init__(self, num_bytes: int) -> None:
        self.now = bytearray(num_bytes)
        self.stores: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self.now)

    def __setitem__(self, where: slice, data: bytes) -> None:
        assert where.stop - where.start == len(data)
        self.stores.append((where.start, data))
        self.now[where] = data

    def take_stores(self) -> list[tuple[int, bytes]]:
        stores, self.stores = self.stores, []
        return stores


@contextmanager
def in_a_file(memory: bytes | bytearray) -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        os.write(fd, memory)
        yield fd
    finally:
        os.close(fd)


def records_in(memory: bytes | bytearray) -> dict[str, LedgerRecord]:
    with in_a_file(memory) as fd:
        return {record.grant.request_id: record for record in read_ledger(fd)}


def deaths(before: bytearray, stores: list[tuple[int, bytes]]) -> Iterator[dict[str, LedgerRecord]]:
    """What a reader finds for a death before the first byte of ``stores``, after it, and so on to
    the last.
    """
    with in_a_file(before) as fd:
        yield {record.grant.request_id: record for record in read_ledger(fd)}
        for start, data in stores:
            for index, byte in enumerate(data):
                os.pwrite(fd, bytes([byte]), start + index)
                yield {record.grant.request_id: record for record in read_ledger(fd)}


def test_peers_read_what_was_written_and_cannot_write() -> None:
    ledger, fd = new_ledger()
    try:
        assert read_ledger(fd) == []
        assert ledger.write(record_of("a"))
        assert ledger.write(record_of("b", num_blocks=5000))
        assert ledger.write(record_of("c"))
        ledger.remove("a")
        ledger.remove("never")
        assert {record.grant.request_id: record for record in read_ledger(fd)} == {
            "b": record_of("b", num_blocks=5000),
            "c": record_of("c"),
        }
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_a_lease_for_which_there_is_no_room_is_not_in_the_ledger() -> None:
    memory = Stores(SMALL_BYTES)
    ledger = Ledger(memory)
    assert ledger.write(record_of("a"))
    assert not ledger.write(record_of("long", num_blocks=200))
    assert records_in(memory.now) == {"a": record_of("a")}
    # What is known already stays when its successor does not fit.
    assert not ledger.write(record_of("a", num_blocks=200))
    assert records_in(memory.now) == {"a": record_of("a")}


def test_entries_run_out_and_come_back() -> None:
    memory = Stores(DIRECTORY_BYTES + 1024 * NUM_ENTRIES)
    ledger = Ledger(memory)
    assert all(ledger.write(record_of(str(number), num_blocks=1)) for number in range(NUM_ENTRIES))
    assert not ledger.write(record_of("more"))
    assert ledger.write(record_of("0", num_readers=2))
    ledger.remove("1")
    assert ledger.write(record_of("more"))
    assert records_in(memory.now).keys() == {
        "more",
        *(str(number) for number in range(NUM_ENTRIES) if number != 1),
    }


@given(
    length=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    checksum=st.integers(0, 2**64 - 1),
)
def test_an_entry_of_any_content_is_no_record(length: int, offset: int, checksum: int) -> None:
    memory = bytearray(SMALL_BYTES)
    memory[:24] = b"".join(number.to_bytes(8, "little") for number in (offset, length, checksum))
    assert records_in(memory) == {}


@settings(max_examples=15, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    ),
)
def test_a_death_in_the_middle_of_a_store_leaves_the_lease_as_it_was_or_as_it_becomes_or_unknown(
    history: list[tuple[str, int, int]],
) -> None:
    """``history``: request, blocks (0: the lease ends), readers. The other leases are there
    throughout.
    """
    memory = Stores(SMALL_BYTES)
    ledger = Ledger(memory)
    for request_id, num_blocks, num_readers in history:
        before, bytes_before = records_in(memory.now), bytearray(memory.now)
        if num_blocks:
            ledger.write(record_of(request_id, num_blocks=num_blocks, num_readers=num_readers))
        else:
            ledger.remove(request_id)
        after = records_in(memory.now)
        others = {known: record for known, record in before.items() if known != request_id}
        for found in deaths(bytes_before, memory.take_stores()):
            assert {
                known: record for known, record in found.items() if known != request_id
            } == others
            assert found.get(request_id) in (before.get(request_id), after.get(request_id), None)


class LedgerMachine(RuleBasedStateMachine):
    """A small ledger against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Stores(SMALL_BYTES)
        self.ledger = Ledger(self.memory)
        self.known: dict[str, LedgerRecord] = {}

    @rule(
        request_id=st.text(max_size=3), num_blocks=st.integers(0, 40), num_readers=st.integers(1, 3)
    )
    def write(self, request_id: str, num_blocks: int, num_readers: int) -> None:
        record = record_of(request_id, num_blocks=num_blocks, num_readers=num_readers)
        if self.ledger.write(record):
            self.known[request_id] = record

    @rule(request_id=st.text(max_size=3))
    def remove_perhaps(self, request_id: str) -> None:
        self.ledger.remove(request_id)
        self.known.pop(request_id, None)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.known:
            self.remove_perhaps(data.draw(st.sampled_from(sorted(self.known))))

    @invariant()
    def readers_find_what_was_written(self) -> None:
        self.ledger.check_integrity()
        assert len(self.ledger) == len(self.known)
        assert records_in(self.memory.now) == self.known


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
