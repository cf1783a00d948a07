"""Damage in a .gguf file is found from header and length: every kind, and in a bounded number of
steps.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.model_files.weights import DOWNLOAD_AGAIN, MAX_STRINGS, check_gguf
from pdlaunch.errors import ConfigError
from tests.config.model_files.files import Gguf, tiny_gguf

GOOD = tiny_gguf().encode()
QUERY = "blk.0.attn_q.weight"
HEADER_BYTES = GOOD.index(b"blk.1.ffn_down.weight") + 100


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_gguf(path)
    assert caught.value.field == "model"
    assert str(path) in str(caught.value)
    assert caught.value.fix == DOWNLOAD_AGAIN
    return str(caught.value).removeprefix(f"{path} is damaged: ")


def test_a_whole_file_is_accepted(tmp_path: Path) -> None:
    check_gguf(tiny_gguf().write(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (GOOD[:4], "it is cut off in its header, at byte 4"),
        (GOOD[: len(GOOD) // 2], "it is cut off: tensor 'blk."),
        (GOOD[:-1], "it is cut off: tensor 'blk.1.ffn_down.weight' ends behind"),
        (GOOD[:8] + struct.pack("<Q", 2**63 - 1) + GOOD[16:], "9223372036854775807 items"),
        (GOOD[:16] + struct.pack("<Q", 2**40) + GOOD[24:], "1099511627776 items"),
        (GOOD[:4] + struct.pack("<I", 99) + GOOD[8:], "version 99, known are versions 2 and 3"),
        (b"PK\x03\x04" + b"x" * 5000, "a zip archive, as PyTorch's pickles are"),
        (b"12345678", "unknown content (it begins with 31 32 33 34 35 36 37 38)"),
        (GOOD.replace(b"general.name", b"general.\xff\xfe\xfd\xfc", 1), "can't decode byte 0xff"),
    ],
)
def test_damaged_bytes_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    assert said in refused(file)


def with_values(**changes: object) -> Gguf:
    made = tiny_gguf()
    for name, value in changes.items():
        made.values[name.replace("__", ".")] = value  # type: ignore[assignment]
    return made


def with_tensor(**changes: dict[str, int]) -> Gguf:
    return replace(tiny_gguf(), **changes)  # type: ignore[arg-type]


def without_tensors(part: str) -> Gguf:
    kept = {name: each for name, each in tiny_gguf().tensors.items() if part not in name}
    return replace(tiny_gguf(), tensors=kept)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            with_values(llama__block_count=2**30),
            "llama.block_count is 1073741824, its tensors have 2",
        ),
        (
            with_values(llama__embedding_length=2**31),
            "llama.embedding_length is 2147483648, its tensors have 32",
        ),
        (with_values(llama__vocab_size=1), "llama.vocab_size is 1, its tensors have 94"),
        (with_values(tokenizer__ggml__tokens=["a"] * 95), "it has 95 tokens, but embeddings of 94"),
        (with_values(general__alignment=3), "general.alignment 3 is no power of two"),
        (with_values(general__alignment="a"), "general.alignment 'a' is no power of two"),
        (with_values(general__architecture=1), "it has no general.architecture"),
        (with_values(split__count=3), "it is one of 3 parts of a model"),
        (
            with_tensor(kinds={QUERY: 4}),
            "tensor 'blk.0.attn_q.weight' has the impossible shape or type",
        ),
        (with_tensor(offsets={QUERY: 1}), "begins at 1, within the one before it"),
        (
            with_tensor(offsets={QUERY: 2**62}),
            "it is cut off: tensor 'blk.0.attn_q.weight'",
        ),
        (without_tensors("token_embd"), "it has no table of embeddings"),
        (without_tensors("blk.0."), "llama.block_count is 2, its tensors have 1"),
    ],
)
def test_damaged_contents_are_named(made: Gguf, said: str, tmp_path: Path) -> None:
    assert said in refused(made.write(tmp_path / "x.gguf"))


def test_a_hostile_number_of_texts_is_not_counted_through(tmp_path: Path) -> None:
    made = with_values(long=["?"])
    content = made.encode()
    at = content.index(struct.pack("<IIQ", 9, 8, 1)) + 8
    file = tmp_path / "x.gguf"
    file.write_bytes(content[:at] + struct.pack("<Q", MAX_STRINGS + 1) + content[at + 8 :])
    with file.open("r+b") as sparse:
        sparse.truncate(8 * (MAX_STRINGS + 2) + len(content))
    assert f"has {MAX_STRINGS + 1} texts, at most {MAX_STRINGS} are read" in refused(file)


@given(length=st.integers(0, len(GOOD) - 1))
def test_no_piece_of_a_file_passes_for_the_whole(
    length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "piece.gguf"
    file.write_bytes(GOOD[:length])
    refused(file)


@given(
    flips=st.lists(
        st.tuples(st.integers(0, HEADER_BYTES), st.integers(0, 7)), min_size=1, max_size=20
    )
)
def test_flipped_bits_of_the_header_are_damage_or_nothing(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD)
    for place, bit in flips:
        content[place] ^= 1 << bit
    file = tmp_path_factory.getbasetemp() / "flips.gguf"
    file.write_bytes(content)
    with contextlib.suppress(ConfigError):
        check_gguf(file)
