"""Spares a conversion the work that transformers does many times over.

transformers parses the header of a GGUF file for the configuration, for the tokenizer and for the
weights, and makes the table of the weights' names anew for each of a model's modules. Of the 31 s
of CPU that the conversion of the demo model took, this was 20.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Let the module ``gguf``, where transformers looks it up at every call, remember the header
    and the table of names.

    Raises ImportError where gguf is not installed.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(_plain_reader(reader))
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _plain_reader(reader_class: Any) -> Any:
    """Return a subclass that keeps its file as a plain array: a header is read in hundreds of
    thousands of slices, and a slice of a ``numpy.memmap`` takes 2.5 times as long.
    """
    import numpy

    class PlainReader(reader_class):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

    return PlainReader
