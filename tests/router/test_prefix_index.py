from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.router.prefix_index import (
    LEAST_MESSAGE_BYTES,
    MAX_PIECES,
    MESSAGE_END,
    PIECE_BYTES,
    Piece,
    ServedPrefixes,
    hash_prefix,
)
from tests.router.test_policy import engine

TEXT = bytes(range(256)) * 8


def test_texts_share_the_pieces_that_they_begin_with() -> None:
    one, other = hash_prefix(TEXT, ""), hash_prefix(TEXT[:600] + b"!" * 600, "")
    assert len(one) == len(TEXT) // PIECE_BYTES
    assert [piece.share for piece in one] == [number / len(one) for number in range(1, 17)]
    assert [piece.hash for piece in one[:4]] == [piece.hash for piece in other[:4]]
    for unlike in (other[4:], hash_prefix(TEXT, "salt")):
        assert not {piece.hash for piece in one} & {piece.hash for piece in unlike}
    assert hash_prefix(None, "") == hash_prefix(b"short", "") == ()


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("said_before", ["", "You are the assistant of a company. " * 30])
def test_chats_that_begin_alike_are_told_from_each_other(
    said_before: str, separators: tuple[str, str]
) -> None:
    """By a question that is shorter than a piece: the next turn goes where its answer is."""

    def text(*said: str) -> bytes:
        messages = [{"role": "user", "content": one} for one in (said_before, *said) if one]
        return json.dumps(messages, separators=separators).encode()

    index, one, other = ServedPrefixes(), engine("decode-0"), engine("decode-1")
    shared = len(said_before) // 4
    for served, question in ((one, "Which way?"), (other, "How long?")):
        index.served(served, hash_prefix(text(question), ""), shared + 20, 500)
    next_turn = hash_prefix(text("How long?", "long " * 500, "Why?"), "")
    assert index.num_cached_tokens(other, next_turn) == shared + 520
    assert index.num_cached_tokens(one, next_turn) <= shared + 20


@pytest.mark.parametrize("text", [MESSAGE_END * 200_000, rb"{\"a\":\"b\"}," * 50_000])
def test_ends_of_objects_in_a_message_are_no_pieces_of_their_own(text: bytes) -> None:
    """Else nearly nothing of the text would be looked at, and such a prompt taken for another."""
    prefix = hash_prefix(text, "")
    assert len(prefix) == MAX_PIECES
    assert prefix[-1].share * len(text) >= MAX_PIECES * LEAST_MESSAGE_BYTES
    assert hash_prefix(text[:20_000] + b"?" * 90_000, "")[-1].hash != prefix[-1].hash
    # What lies behind the pieces may be another one's.
    index, one = ServedPrefixes(), engine("decode-0")
    index.served(one, prefix, 100_000, 500)
    assert index.num_cached_tokens(one, prefix) == int(100_000 * prefix[-1].share) < 50_000


def pieces_of(text: int) -> tuple[Piece, ...]:
    return tuple(Piece(text * 100 + number, (number + 1) / 9) for number in range(9))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9), st.integers(0, 5)), max_size=40))
def test_memory_is_bounded_and_nothing_is_known_that_was_not_served(
    served: list[tuple[int, int, int]],
) -> None:
    index, one = ServedPrefixes(max_pieces=20), engine("decode-0")
    most: dict[int, int] = {}
    for text, num_pieces, num_output_tokens in served:
        prefix = pieces_of(text)[:num_pieces]
        index.served(one, prefix, 32 * num_pieces, num_output_tokens)
        most[text] = max(most.get(text, 0), 32 * num_pieces + num_output_tokens)
    assert sum(len(pieces) for _, pieces in index._engines.values()) <= 20
    for text, num_tokens in most.items():
        prefix = pieces_of(text)
        assert index.num_cached_tokens(one, prefix) <= num_tokens
