"""Weights of a directory in Hugging Face layout: read in pieces, made up, and hashed."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from pdlaunch.config.model_files.weights import weight_files

Cut = tuple[int, slice]

DUMMY_STD = 0.02
_WRAPPED_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""The place where multimodal checkpoints keep the language model."""
_IGNORED_PREFIXES = (
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "_model_name_or_path")
_PIECE_BYTES = 1024
_PIECES_PER_TENSOR = 3


def read_tensors(files: list[Path], cuts: dict[str, Cut]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the language model with its name; of cut ones only this rank's part."""
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 - not a mapping
                name = _name_in_model(key)
                if name is None:
                    continue
                cut = cuts.get(name)
                yield (
                    name,
                    checkpoint.get_tensor(key)
                    if cut is None
                    else _part(checkpoint.get_slice(key), cut),
                )


def dummy_tensor(
    name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, cut: Cut | None
) -> torch.Tensor:
    """Return small random numbers that depend on the name alone.

    So every rank of every engine draws the same model.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    whole = torch.empty(shape, dtype=dtype, device=device).normal_(
        0.0, DUMMY_STD, generator=generator
    )
    return whole if cut is None else _part(whole, cut).clone()


def digest_model(model_dir: Path, *, dummy: bool) -> str:
    """Return the SHA-256 (hex) of config.json and the weights.

    Of each file of weights, size, header and pieces of every tensor are hashed.
    """
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    if dummy:
        digest.update(b"dummy")
        return digest.hexdigest()
    for file in weight_files(model_dir):
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield size and header, then the start, middle and end of every tensor.

    Source: the safetensors format (length, JSON, tensors).
    """
    yield path.stat().st_size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        tensors = {
            name: entry for name, entry in json.loads(header).items() if name != "__metadata__"
        }
        for entry in tensors.values():
            start, stop = entry["data_offsets"]
            for piece in range(_PIECES_PER_TENSOR):
                file.seek(
                    8
                    + length
                    + start
                    + piece * max(stop - start - _PIECE_BYTES, 0) // (_PIECES_PER_TENSOR - 1)
                )
                yield file.read(min(_PIECE_BYTES, stop - start))


def _name_in_model(key: str) -> str | None:
    if key.startswith(_IGNORED_PREFIXES) or key.endswith(_IGNORED_SUFFIX):
        return None
    for wrapped, own in _WRAPPED_PREFIXES:
        if key.startswith(wrapped):
            return own + key.removeprefix(wrapped)
    return key


def _part(source: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return the part of ``source``, a tensor or a slice object of safetensors.

    The latter reads only what is asked for.
    """
    dimension, share = cut
    return source[share] if dimension == 0 else source[:, share]
