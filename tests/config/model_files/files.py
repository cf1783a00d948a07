"""Files of models, made byte by byte so that any of their bytes can be wrong."""

import json
import math
import random
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from pdlaunch.config.model_files.shape import ModelShape, read_model_shape
from tests.checks.contexts import TINY


def all_weights(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return shape.other_weights | {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape.num_layers)
        for name, size in shape.layer_weights.items()
    }


def safetensors(tensors: Mapping[str, object], data: bytes) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


EMPTY_SAFETENSORS = safetensors({}, b"")
"""A whole file without a tensor."""


def write_weights(folder: Path) -> None:
    tensors, end = {}, 0
    for name, size in all_weights(read_model_shape(folder)).items():
        start, end = end, end + math.prod(size)
        tensors[name] = {"dtype": "U8", "shape": size, "data_offsets": [start, end]}
    (folder / "model.safetensors").write_bytes(safetensors(tensors, bytes(end)))


def tiny_model(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    write_weights(folder)
    return str(folder)


def cached_model(hub: Path, name: str, commit: str = "a" * 40, revision: str = "main") -> Path:
    """Return the folder of a model in a cache, as huggingface_hub lays it out."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot, ref = repository / "snapshots" / commit, repository / "refs" / revision
    for folder in (snapshot, ref.parent):
        folder.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


def write_safetensors(path: Path, *, num_bytes: int) -> None:
    """Write a whole file of one tensor, whose bytes differ by the file's name."""
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    path.write_bytes(safetensors({"a": tensor}, random.Random(path.name).randbytes(num_bytes)))


Value = int | float | str | Sequence[str]


@dataclass
class Gguf:
    values: dict[str, Value]
    tensors: dict[str, tuple[tuple[int, ...], Sequence[float]]]
    """By name: dimensions, rows last, and numbers."""

    def encode(self) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            return self.write(Path(file.name)).read_bytes()

    def write(self, path: Path) -> Path:
        values = dict(self.values)
        writer = GGUFWriter(path, values.pop("general.architecture"))
        for key, value in values.items():
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
        for name, (dimensions, numbers) in self.tensors.items():
            writer.add_tensor(name, np.array(numbers, np.float32).reshape(dimensions[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def tiny_gguf() -> Gguf:
    """A Llama of two heads that knows single letters, as transformers can read it."""
    num_layers, width, inner = 2, 32, 64
    tokens = [*(chr(code) for code in range(33, 127)), "ab"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (width, len(tokens)),
        "output_norm.weight": (width,),
    }
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": (width, width)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{layer}.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": (width, inner) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (inner, width)
    values: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": num_layers,
        "llama.context_length": 128,
        "llama.embedding_length": width,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return Gguf(
        values,
        {
            name: (shape, [0.01 * (1 + index % 7) for index in range(math.prod(shape))])
            for name, shape in shapes.items()
        },
    )
