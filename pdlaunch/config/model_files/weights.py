"""Finds the weight files of a model, and damage to them, without reading a tensor.

safetensors judges its own files. The package ``gguf`` takes seconds for a header (5 s for a
vocabulary of 49,152), so this module walks .gguf headers itself and asks the package for the sizes
of blocks alone. A flipped bit that leaves a plausible number goes unnoticed: there is no checksum.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdlaunch.config.model_files.shape import ModelShape, read_json
from pdlaunch.errors import ConfigError

INDEX = "model.safetensors.index.json"
DOWNLOAD_AGAIN = (
    "Download the file again, and compare its size and SHA-256 with those at its source."
)
MAX_STRINGS = 2**22
"""Most strings in one list of a .gguf file, several times the largest vocabularies."""
MAX_TOKENIZER_BYTES = 256 * 1024**2
"""Several times the largest that are published, of 33 MB."""
_TENSOR = re.compile(
    # A multimodal file has the language model's below a name of its own.
    r"(?:language_model\.)?model\.(?:language_model\.)?(?:layers\.\d+\.)?"
    r"(embed_tokens|self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
_PICKLES = ("*.bin", "*.pt", "*.pth")
_OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was never fetched "
    "(`git lfs pull`)",
    b"PK\x03\x04": "a zip archive, as PyTorch's pickles are",
    b"\x80": "a pickle",
    b"<": "an HTML or XML page, as servers send instead of a file",
    b"GGUF": "a .gguf file",
}
"""The first bytes of other content that is found in place of model files."""
_GGUF_VERSIONS = (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Characters of ``struct`` by the type of a value."""
_STRING, _LIST = 8, 9
_UNKNOWN_BLOCK = (1, 0)


def damaged(path: Path, what: str, *, fix: str = DOWNLOAD_AGAIN) -> ConfigError:
    """Make the error for a file of the model that cannot be used as it is."""
    return ConfigError(f"{path} is damaged: {what}", field="model", value=str(path), fix=fix)


def weight_files(model_dir: Path) -> list[Path]:
    """Find the checkpoint's safetensors files.

    Raises ConfigError (field ``model``) when there are none, or one is damaged.
    """
    index = model_dir / INDEX
    # An index wins over a glob: folders often hold a second, merged copy of the weights.
    files = (
        [model_dir / name for name in names_in(index)]
        if index.is_file()
        else sorted(model_dir.glob("model*.safetensors"))
    )
    missing = [file.name for file in files if not file.is_file()]
    if files and not missing:
        for file in files:
            _check_safetensors(file)
        return files
    # Pickles are named only where there is nothing else: many checkpoints have both.
    pickles = sorted(file.name for pattern in _PICKLES for file in model_dir.glob(pattern))
    if pickles and not files:
        raise ConfigError(
            f"{model_dir} has its weights only as pickles ({_shorten(pickles)}), which can run "
            "code when they are opened",
            field="model",
            value=str(model_dir),
            fix="Convert them to safetensors where you trust them: load the model with "
            "transformers and save_pretrained(DIR).",
        )
    raise ConfigError(
        f"{model_dir} has no {_shorten(missing) or 'model*.safetensors'}"
        + (f", which {INDEX} names" if missing else ""),
        field="model",
        value=str(model_dir),
        fix="Complete the download; checkpoints in other formats have to be saved as safetensors "
        "first.",
    )


def check_files(model_dir: Path, shape: ModelShape) -> None:
    """Compare the headers of the weights with the shape in config.json, and read tokenizer.json.

    Raises ConfigError: a rank would find the same only after its libraries are loaded.
    """
    kv_size = shape.num_kv_heads * shape.head_dim
    query_size = shape.num_attention_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = {
        "embed_tokens": [shape.vocab_size, hidden],
        "self_attn.q_proj": [query_size, hidden],
        "self_attn.k_proj": [kv_size, hidden],
        "self_attn.v_proj": [kv_size, hidden],
        "self_attn.o_proj": [hidden, query_size],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    for file in weight_files(model_dir):
        for name, found in _tensor_shapes(file):
            match = _TENSOR.fullmatch(name)
            if match is not None and found != sizes[match[1]]:
                what = f"{name} has the shape {found}, by config.json it is {sizes[match[1]]}"
                raise damaged(file, what, fix="Download weights and config.json of one version.")
    tokenizer = model_dir / "tokenizer.json"
    # A prompt may come as token ids, so a model without the file can be served.
    if os.path.lexists(tokenizer):
        read_json(tokenizer, MAX_TOKENIZER_BYTES)


def _tensor_shapes(path: Path) -> list[tuple[str, list[int]]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118


def names_in(index: Path) -> list[str]:
    """Return the files that an index names. Raises ConfigError when it cannot be read."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        # Who publishes a model does not choose which files of this machine are read.
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, f"it cannot be read ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise _unreadable(index, error) from None
    return names


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            head = file.read(64)
        # Opening checks the header against the length of the file.
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        is_other = len(head) < 9 or head[8:9] != b"{"
        cut_off = f"it is cut off at byte {path.stat().st_size}, or its header is wrong ({error})"
        raise damaged(path, _described("safetensors", head) if is_other else cut_off) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _described(kind: str, head: bytes) -> str:
    """Describe a file that begins with ``head`` and is not of the kind that its name says."""
    known = (name for start, name in _OTHER_CONTENT.items() if head.startswith(start))
    content = next(known, f"unknown content (it begins with {head[:8].hex(' ')})")
    return f"it is no {kind} file but {content}" if head else "it is empty"


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"{path} cannot be read: {reason}", field="model", value=str(path))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_gguf(path: Path) -> None:
    """Read the header of a .gguf file.

    Raises ConfigError (field ``model``) for a damaged or incomplete file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if not head.startswith(b"GGUF"):
                raise damaged(path, _described("GGUF", head))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_header(_Header(data, os.fstat(file.fileno()).st_size))
    except ConfigError:
        raise
    except (ValueError, struct.error) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise _unreadable(path, error) from None


@dataclass
class _Header:
    """Reads a header from front to back; raises ValueError or struct.error."""

    data: mmap.mmap
    size: int
    at: int = 4

    def number(self, form: str) -> int:
        """Read one number; ``form`` is its character of ``struct``."""
        if self.at + struct.calcsize(form) > self.size:
            raise ValueError(f"it is cut off in its header, at byte {self.size}")
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value) if math.isfinite(value) else 0

    def count(self, least_bytes: int) -> int:
        """Read the count of items, which the rest of the file must be able to hold."""
        count = self.number("Q")
        if count * least_bytes > self.size - self.at:
            raise ValueError(f"it says that it has {count} items at byte {self.at}, and is cut off")
        return count

    def text(self) -> str:
        length = self.count(1)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> int | str:
        """Read a value; of a list its length, whose items are skipped."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        item = self.number("I") if kind == _LIST else kind
        if item in _SCALARS:
            length = self.count(struct.calcsize(_SCALARS[item]))
            self.at += length * struct.calcsize(_SCALARS[item])
        elif item == _STRING:
            # A text takes 8 bytes at least, for its length.
            if (length := self.count(8)) > MAX_STRINGS:
                raise ValueError(f"a list has {length} texts, at most {MAX_STRINGS} are read")
            for _ in range(length):
                self.text()
        else:
            raise ValueError(f"a value has the unknown type {item}")
        return length


def _check_header(header: _Header) -> None:
    if (version := header.number("I")) not in _GGUF_VERSIONS:
        known = " and ".join(map(str, _GGUF_VERSIONS))
        raise ValueError(f"it says that it is GGUF version {version}, known are versions {known}")
    # Counts come before their items: a damaged one must not start a long loop.
    num_tensors, num_values = header.count(24), header.count(13)
    values: dict[str, int | str] = {}
    for _ in range(num_values):
        key = header.text()
        values[key] = header.value(header.number("I"))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r} is no power of two")
    shapes, places = {}, {}
    for _ in range(num_tensors):
        name = header.text()
        if (num_dimensions := header.number("I")) not in range(1, 5):
            raise ValueError(f"tensor {name!a} has {num_dimensions} dimensions")
        shapes[name] = tuple(header.number("Q") for _ in range(num_dimensions))
        places[name] = (header.number("I"), header.number("Q"))
    if len(shapes) != num_tensors:
        raise ValueError("a tensor is there twice")
    if isinstance(parts := values.get("split.count", 1), int) and parts > 1:
        join = "join them with `llama-gguf-split --merge`"
        raise ValueError(f"it is one of {parts} parts of a model; {join}")
    # Data begins at the next multiple of the alignment after the header.
    data_start = -(-header.at // alignment) * alignment
    _check_places(shapes, places, header.size - data_start)
    _check_model(values, shapes)


def _check_places(
    shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]], room: int
) -> None:
    """Require that every tensor has bytes of its own within the file."""
    sizes = _block_sizes()
    end = 0
    for name, (kind, start) in sorted(places.items(), key=lambda item: item[1][1]):
        block, block_bytes = sizes.get(kind, _UNKNOWN_BLOCK)
        if (sizes and kind not in sizes) or 0 in shapes[name] or shapes[name][0] % block:
            raise ValueError(f"tensor {name!a} has the impossible shape or type {shapes[name]}")
        if start < end:
            raise ValueError(f"tensor {name!a} begins at {start}, within the one before it")
        end = start + math.prod(shapes[name]) // block * block_bytes
        if end > room or start >= room:
            raise ValueError(f"it is cut off: tensor {name!a} ends behind the end of the file")


def _block_sizes() -> Mapping[int, tuple[int, int]]:
    """Return elements and bytes of a block by tensor type; empty without the package."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:  # A rule asks for the package: without it nothing is converted.
        return {}
    sizes: Mapping[int, tuple[int, int]] = GGML_QUANT_SIZES
    return sizes


def _check_model(values: Mapping[str, int | str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Require that the sizes in the values are those of the tensors.

    A reader that believes a wrong one would allocate without end.
    """
    if not isinstance(values.get("general.architecture"), str):
        raise ValueError("it has no general.architecture")
    embeddings = shapes.get("token_embd.weight", ())
    if len(embeddings) != 2:
        raise ValueError("it has no table of embeddings (token_embd.weight)")
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    inner = {shape[-1] for name, shape in shapes.items() if ".ffn_up" in name and len(shape) > 1}
    found = {
        "embedding_length": {embeddings[0]},
        "block_count": {len(layers)},
        "feed_forward_length": inner,
        "vocab_size": {embeddings[1]},
    }
    for name, sizes in found.items():
        key = f"{values.get('general.architecture')}.{name}"
        value = values.get(key)
        if isinstance(value, int) and sizes and value not in sizes:
            raise ValueError(f"{key} is {value}, its tensors have {min(sizes)}")
    tokens = values.get("tokenizer.ggml.tokens", 0)
    if isinstance(tokens, int) and tokens > embeddings[1]:
        raise ValueError(f"it has {tokens} tokens, but embeddings of {embeddings[1]}")
    if layers != {str(index) for index in range(len(layers))}:
        raise ValueError(f"it has {len(layers)} layers, but not those from 0 on")
