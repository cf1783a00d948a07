"""Tells one model from another by its files: digests that a launch pins at its first start.

Weights are sampled, so that a start does not read them twice: the size and header of each file, and
the start, middle and end of every tensor. An edit of a few bytes elsewhere goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pdlaunch.config.model_files.weights import weight_files

_CONFIG = "config.json"
# Beginnings of the names of the other files that affect answers
_TEXT_PREFIXES = (
    *("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece"),
    *("chat_template", "generation_config", "preprocessor", "processor"),
)
# These depend on how the model was saved, not on what it computes.
_IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "_model_name_or_path")
_PIECE_BYTES = 1024
_PIECES_PER_TENSOR = 3
# Of checkpoints that are not in safetensors
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_CONFIGS = {_CONFIG, "params.json"}
_PIECES_PER_FILE = 1024
_SHOWN_DIGITS = 12
_logger = logging.getLogger(__name__)


def weight_digests(model_dir: Path, *, dummy: bool = False) -> dict[str, str]:
    """Return a SHA-256 (hex) of config.json and of each file of weights, by name.

    ``dummy``: the weights are made up, only config.json counts. Raises ConfigError when files are
    missing or damaged.
    """
    started_at = time.monotonic()
    config = json.loads((model_dir / _CONFIG).read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    digests = {_CONFIG: hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}
    if dummy:
        return digests | {"dummy weights": ""}
    for file in weight_files(model_dir):
        digest = hashlib.sha256()
        for piece in _pieces(file):
            digest.update(piece)
        digests[file.name] = digest.hexdigest()
    taken_ms = (time.monotonic() - started_at) * 1000
    _logger.debug("digests of the weights in %s took %.1f ms", model_dir, taken_ms)
    return digests


def sampled_digests(model: Path) -> dict[str, str]:
    """Return a SHA-256 (hex) of the size and samples of each file of weights, in any format.

    ``model``: a folder, or one file.
    """
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    digests = {}
    for file in files:
        if file.suffix not in _WEIGHTS and file.name not in _CONFIGS:
            continue
        size = file.stat().st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            for piece in range(_PIECES_PER_FILE):
                opened.seek(piece * max(size - _PIECE_BYTES, 0) // (_PIECES_PER_FILE - 1))
                digest.update(opened.read(_PIECE_BYTES))
        digests[file.name] = digest.hexdigest()
    return digests


def text_digests(model_dir: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of each file that ``text_files`` finds, by name."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in text_files(model_dir)
    }


def text_files(model_dir: Path) -> list[Path]:
    """Return the files of tokenizer, templates and defaults."""
    files = sorted(model_dir.iterdir())
    return [file for file in files if file.name.startswith(_TEXT_PREFIXES) and file.is_file()]


def only_text(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the ones of ``text_digests`` among the digests of a model."""
    return {name: each for name, each in digests.items() if name.startswith(_TEXT_PREFIXES)}


def model_digest(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) of ``weight_digests``: KV blocks of equal models are equal."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def changes(pinned: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Name the files whose digests differ, with both digests; empty if all are equal."""
    return ", ".join(
        f"{name} ({_shown(pinned.get(name))} then, {_shown(found.get(name))} now)"
        for name in sorted(pinned.keys() | found.keys())
        if pinned.get(name) != found.get(name)
    )


def _shown(digest: str | None) -> str:
    return "missing" if digest is None else f"SHA-256 {digest[:_SHOWN_DIGITS]}"


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield size and header, then the start, middle and end of every tensor.

    Source: the safetensors format (length, JSON, tensors).
    """
    yield path.stat().st_size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        tensors = {name: at for name, at in json.loads(header).items() if name != "__metadata__"}
        for entry in tensors.values():
            start, stop = entry["data_offsets"]
            for piece in range(_PIECES_PER_TENSOR):
                skipped = piece * max(stop - start - _PIECE_BYTES, 0) // (_PIECES_PER_TENSOR - 1)
                file.seek(8 + length + start + skipped)
                yield file.read(min(_PIECE_BYTES, stop - start))
