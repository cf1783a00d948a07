"""Finds damage in a .gguf file from its header and its length, without torch, gguf or its weights.

::

    magic | version | number of tensors, of values | values | tensor infos | padding | tensor data
    0       4         8                              24

A flipped bit that leaves a number or a text plausible goes unnoticed: the format has no checksum.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pdlaunch.config.model_files.damage import damaged, describe_content
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_STRINGS = 2**22
"""Most strings in one list, several times the largest vocabularies: a hostile count must not keep
the reader busy.
"""

_DEFAULT_ALIGNMENT = 32
_MIN_VALUE_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
# fmt: off
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
# fmt: on
"""Characters of ``struct`` by the type of a value."""
_STRING, _LIST = 8, 9

# fmt: off
_BLOCKS: Mapping[int, tuple[int, int]] = {
    # Types that are not quantized.
    0: (1, 4), 1: (1, 2), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
    # Blocks of 32.
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 20: (32, 18),
    39: (32, 17),
    # Larger blocks: K, then I, then the others.
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 29: (256, 56), 34: (256, 54), 35: (256, 66), 40: (64, 36), 41: (128, 18),
}
# fmt: on
"""Elements and bytes of a block by tensor type. Source: GGML_QUANT_SIZES of gguf-py 0.19."""


@dataclass(frozen=True, slots=True)
class _List:
    """Stands for a list among the values, whose items were skipped."""

    length: int


Value = int | float | str | _List


class _DamageError(Exception):
    """Says what is wrong with a file."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    dimensions: tuple[int, ...]
    """Sizes with the rows last, in reverse of PyTorch's order."""
    start: int
    """The offset of its data in bytes, from the start of all data."""
    num_bytes: int


class _Reader:
    """Reads a file from front to back, and never more than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.position = 0

    def skip(self, num_bytes: int, what: str) -> None:
        self._advance(num_bytes, what)
        self._file.seek(self.position)

    def number(self, form: str, what: str) -> int | float:
        """Read one number; ``form`` is its character of ``struct``."""
        layout = "<" + form
        value: int | float = struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]
        return value

    def count(self, form: str, what: str) -> int:
        return int(self.number(form, what))

    def string(self, what: str) -> str:
        content = self._take(self.count("Q", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise _DamageError(f"{what} is not UTF-8") from None

    def check_room(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        left = self._size - self.position
        if count * item_bytes > left:
            raise _DamageError(f"it says that it has {count} {what}, but only {left} bytes follow")

    def _take(self, num_bytes: int, what: str) -> bytes:
        self._advance(num_bytes, what)
        return self._file.read(num_bytes)

    def _advance(self, num_bytes: int, what: str) -> None:
        end = self.position + num_bytes
        if end > self._size:
            raise _DamageError(
                f"{what} would end at byte {end}, the file ends at byte {self._size}"
            )
        self.position = end


def check_gguf(path: Path) -> None:
    """Read the header. Raises ConfigError (field ``model``) for a damaged or incomplete file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_other_content(file.read(64))
            file.seek(len(MAGIC))
            reader = _Reader(file, size)
            reader.position = len(MAGIC)
            _check_header(reader, size)
    except _DamageError as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}", field="model", value=str(path)
        ) from None


def _refuse_other_content(head: bytes) -> None:
    if not head.startswith(MAGIC):
        raise _DamageError(
            f"it is no GGUF file but {describe_content(head)}" if head else "it is empty"
        )


def _check_header(reader: _Reader, size: int) -> None:
    version = reader.count("I", "the version")
    if version not in VERSIONS:
        raise _DamageError(
            f"it says that it is GGUF version {version}, known are versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    num_tensors = reader.count("Q", "the number of tensors")
    num_values = reader.count("Q", "the number of values")
    # Counts come before their items: a damaged one must not start a long loop.
    reader.check_room(num_values, _MIN_VALUE_BYTES, "values")
    reader.check_room(num_tensors, _MIN_TENSOR_BYTES, "tensors")
    values = _read_values(reader, num_values)
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _DamageError(f"general.alignment {alignment!r} is no power of two")
    tensors = _read_tensors(reader, num_tensors, alignment)
    _refuse_parts(values)
    # Data begins at the next multiple of the alignment after the header.
    _check_places(tensors, data_start=-(-reader.position // alignment) * alignment, size=size)
    _check_model(values, tensors)


def _read_values(reader: _Reader, num_values: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for index in range(num_values):
        key = reader.string(f"the key of value {index} of {num_values}")
        if key in values:
            raise _DamageError(f"value {key!a} is there twice")
        values[key] = _read_value(
            reader, reader.count("I", f"the type of {key!a}"), f"value {key!a}"
        )
    return values


def _read_value(reader: _Reader, kind: int, what: str) -> Value:
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind], what)
    if kind == _STRING:
        return reader.string(what)
    if kind != _LIST:
        raise _DamageError(f"{what} has the unknown type {kind}")
    item_kind, length = reader.count("I", what), reader.count("Q", what)
    if item_kind in _SCALARS:
        reader.skip(length * struct.calcsize("<" + _SCALARS[item_kind]), what)
    elif item_kind == _STRING:
        # A text takes 8 bytes at least, for its length.
        reader.check_room(length, 8, f"texts in {what}")
        if length > MAX_STRINGS:
            raise _DamageError(f"{what} has {length} texts, at most {MAX_STRINGS} are read")
        for _ in range(length):
            reader.string(what)
    else:
        raise _DamageError(f"{what} is a list of the unknown type {item_kind}")
    return _List(length)


def _read_tensors(reader: _Reader, num_tensors: int, alignment: int) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for index in range(num_tensors):
        name = reader.string(f"the name of tensor {index} of {num_tensors}")
        what = f"tensor {name!a}"
        if name in tensors:
            raise _DamageError(f"{what} is there twice")
        tensors[name] = _read_tensor(reader, what, alignment)
    return tensors


def _read_tensor(reader: _Reader, what: str, alignment: int) -> _Tensor:
    num_dimensions = reader.count("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _DamageError(f"{what} has {num_dimensions} dimensions")
    dimensions = tuple(reader.count("Q", what) for _ in range(num_dimensions))
    kind, start = reader.count("I", what), reader.count("Q", what)
    if kind not in _BLOCKS:
        raise _DamageError(f"{what} has the unknown type {kind}")
    block, block_bytes = _BLOCKS[kind]
    if 0 in dimensions or dimensions[0] % block:
        raise _DamageError(f"{what} has the impossible shape {dimensions} for blocks of {block}")
    if start % alignment:
        raise _DamageError(
            f"{what} begins at {start}, which is no multiple of the alignment {alignment}"
        )
    return _Tensor(dimensions, start, math.prod(dimensions) // block * block_bytes)


def _refuse_parts(values: Mapping[str, Value]) -> None:
    parts = values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise _DamageError(
            f"it is one of {parts} parts of a model; join them with `llama-gguf-split --merge`"
        )


def _check_places(tensors: Mapping[str, _Tensor], *, data_start: int, size: int) -> None:
    """Require that every tensor has bytes of its own within the file."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _DamageError(
                f"tensor {name!a} begins at {tensor.start}, within the one before it"
            )
        end = tensor.start + tensor.num_bytes
        if data_start + end > size:
            raise _DamageError(
                f"it is cut off: tensor {name!a} ends at byte {data_start + end} "
                f"({format_size(data_start + end)}),"
                f" the file at byte {size} ({format_size(size)})"
            )


def _check_model(values: Mapping[str, Value], tensors: Mapping[str, _Tensor]) -> None:
    """Require that the sizes in the values are those of the tensors.

    A reader that believes a wrong one would allocate without end.
    """
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise _DamageError("it has no general.architecture")
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.dimensions) != 2:
        raise _DamageError("it has no table of embeddings (token_embd.weight)")
    width, vocabulary = embeddings.dimensions
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    inner = {
        t.dimensions[1]
        for name, t in tensors.items()
        if ".ffn_up" in name and len(t.dimensions) > 1
    }
    found = {
        "embedding_length": {width},
        "block_count": {len(layers)},
        "feed_forward_length": inner,
        "vocab_size": {vocabulary},
    }
    for name, sizes in found.items():
        value = values.get(f"{architecture}.{name}")
        if isinstance(value, int) and sizes and value not in sizes:
            raise _DamageError(f"{architecture}.{name} is {value}, its tensors have {min(sizes)}")
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, _List) and tokens.length > vocabulary:
        raise _DamageError(f"it has {tokens.length} tokens, but embeddings of {vocabulary}")
    if layers != {str(index) for index in range(len(layers))}:
        raise _DamageError(
            f"it has {len(layers)} layers, but not those from 0 to {len(layers) - 1}"
        )
