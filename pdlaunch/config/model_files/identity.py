"""Identifies a model by digests of its files, which a launch pins at its first start.

Weights are sampled, so that a start does not read them twice: size and header of each file, and the
start, middle and end of each tensor. A change of a few bytes elsewhere is not noticed.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pdlaunch.config.model_files.weights import TEXT_PREFIXES, weight_files
from pdlaunch.errors import ConfigError

_CONFIG = "config.json"
# Fields that depend on how the model was saved and do not affect answers
_IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "_model_name_or_path")
_PIECE_BYTES = 1024
_PIECES_PER_TENSOR = 3
# For ``sampled_digests``: files of weights and configurations in any format
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_CONFIGS = {_CONFIG, "params.json"}
_PIECES_PER_FILE = 1024
_SHOWN_DIGITS = 12
_logger = logging.getLogger(__name__)


def weight_digests(model_dir: Path, *, dummy: bool = False) -> dict[str, str]:
    """Return the SHA-256 (hex) of config.json and, unless they are random (``dummy``), of samples
    of each safetensors file, by name. Raises ConfigError.
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
    """Return the SHA-256 (hex) of size and samples of each file of weights in a folder."""
    return {
        file.name: _sampled_digest(file)
        for file in _files(model)
        if file.suffix in _WEIGHTS or file.name in _CONFIGS
    }


def named_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of a file, or of each file in a folder, by path."""
    return {
        str(file.absolute()): _sampled_digest(file) if file.suffix in _WEIGHTS else _digest(file)
        for file in _files(path)
        if file.is_file()
    }


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sampled_digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        for piece in range(_PIECES_PER_FILE):
            opened.seek(piece * max(size - _PIECE_BYTES, 0) // (_PIECES_PER_FILE - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()


def text_digests(model_dir: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of each file of ``text_files``, by name."""
    return {file.name: _digest(file) for file in text_files(model_dir)}


def text_files(model_dir: Path) -> list[Path]:
    """Return the files of tokenizer, chat templates and sampling defaults, and Python code."""
    return [file for file in sorted(model_dir.iterdir()) if _is_text(file.name) and file.is_file()]


def only_text(digests: Mapping[str, str]) -> dict[str, str]:
    """Return only the digests of text files, such as the tokenizer and the chat template."""
    return {name: each for name, each in digests.items() if _is_text(name)}


def _is_text(name: str) -> bool:
    return name.startswith(TEXT_PREFIXES) or (name.endswith(".py") and "/" not in name)


def model_digest(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) over ``weight_digests``, or an empty text. Models with equal digests
    can share KV. Files outside the folder do not count: they may differ by role.
    """
    own = sorted(item for item in digests.items() if "/" not in item[0])
    return hashlib.sha256(json.dumps(own).encode()).hexdigest() if own else ""


def changes(pinned: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Return a text with each file whose digests differ and both digests; empty if none do."""
    return ", ".join(
        f"{name} ({_shown(pinned.get(name))} before, {_shown(found.get(name))} now)"
        for name in sorted(pinned.keys() | found.keys())
        # A file outside the model's folder, which a path names, counts only if both sides have it.
        if pinned.get(name) != found.get(name)
        and ("/" not in name or (name in pinned and name in found))
    )


def refuse_changes(
    before: Mapping[str, str], found: Mapping[str, str], when: str = "since this launch began"
) -> None:
    """Raise ConfigError that names the files whose digests differ, if there are any."""
    if changed := changes(before, found):
        fix = "Put the files back, or start a new launch"
        raise ConfigError(f"the model has changed {when}: {changed}. {fix}", field="model")


def _shown(digest: str | None) -> str:
    return "missing" if digest is None else f"SHA-256 {digest[:_SHOWN_DIGITS]}"


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield size and header of a safetensors file, then start, middle and end of each tensor."""
    yield path.stat().st_size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for entry in tensors.values():
            start, stop = entry["data_offsets"]
            for piece in range(_PIECES_PER_TENSOR):
                skipped = piece * max(stop - start - _PIECE_BYTES, 0) // (_PIECES_PER_TENSOR - 1)
                file.seek(8 + length + start + skipped)
                yield file.read(min(_PIECE_BYTES, stop - start))
