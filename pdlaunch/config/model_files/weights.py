"""Finds the weight files of a directory in Hugging Face layout, and damage to them, without reading
a tensor.

Source of the format: https://github.com/huggingface/safetensors (length of the header, header in
JSON, data of the tensors).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pdlaunch.config.model_files.damage import damaged, describe_content
from pdlaunch.config.sizes import format_size
from pdlaunch.errors import ConfigError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
_LENGTH_BYTES = 8
_PICKLES = ("*.bin", "*.pt", "*.pth")


def weight_files(model_dir: Path) -> list[Path]:
    """Find the checkpoint's safetensors files.

    Raises ConfigError (field ``model``) when there are none, or one is damaged.
    """
    index = model_dir / INDEX
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
            (
                f"{model_dir} has its weights only as pickles ({_shorten(pickles)}), which can run "
                "code when they are opened"
            ),
            field="model",
            value=str(model_dir),
            fix=(
                "Convert them to safetensors where you trust them: load the model with "
                "transformers and save_pretrained(DIR)."
            ),
        )
    raise ConfigError(
        f"{model_dir} has no {_shorten(missing) or 'model*.safetensors'}"
        + (f", which {INDEX} names" if missing else ""),
        field="model",
        value=str(model_dir),
        fix=(
            "Complete the download; checkpoints in other formats have to be saved as safetensors "
            "first."
        ),
    )


def _check_safetensors(path: Path) -> None:
    """Check header and length. Raises ConfigError when the file is cut off or cannot be read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # A wrong file is told by its first bytes, before a length in them is believed.
            head = file.read(64)
            length = int.from_bytes(head[:_LENGTH_BYTES], "little")
            if (
                len(head) < _LENGTH_BYTES
                or length > MAX_HEADER_BYTES
                or head[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"{", b"")
            ):
                raise damaged(
                    path,
                    f"it is no safetensors file but {describe_content(head)}"
                    if head
                    else "it is empty",
                )
            file.seek(_LENGTH_BYTES)
            header = file.read(min(length, size))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}", field="model", value=str(path)
        ) from None
    if len(header) < length:
        raise damaged(
            path, f"it is cut off within its header: byte {size} of {_LENGTH_BYTES + length}"
        )
    end = _LENGTH_BYTES + length + _data_bytes(path, header)
    if size < end:
        raise damaged(
            path,
            (
                f"it is cut off: {format_size(size)} ({size} bytes) of {format_size(end)} ({end} "
                "bytes) are there"
            ),
        )
    if size > end:
        raise damaged(path, f"it has {size - end} bytes more than its header knows of")


def _data_bytes(path: Path, header: bytes) -> int:
    """Return where the last tensor ends, in bytes. Tensors follow each other without gaps."""
    try:
        entries: dict[str, Any] = json.loads(header)
        places = sorted(
            tuple(entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        )
        end = 0
        # | header | tensor | tensor | ... | end of the file: a gap or an overlap is damage, too.
        for start, stop in places:
            if start != end or stop < start:
                raise damaged(
                    path,
                    f"its header has a tensor from {start} to {stop} where one begins at {end}",
                )
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # Those raised above are ValueErrors, too.
        if isinstance(error, ConfigError):
            raise
        raise damaged(
            path, f"its header cannot be read ({type(error).__name__}: {error})"
        ) from None
    return end


def names_in(index: Path) -> list[str]:
    """Return the files that an index names. Raises ConfigError when it cannot be read."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a file name is no text")
        # Who publishes a model does not choose which files of this machine are read.
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, f"it cannot be read ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise ConfigError(
            f"{index} cannot be read: {error.strerror or error}", field="model", value=str(index)
        ) from None
    return names


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
