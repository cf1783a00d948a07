"""Finds the weight files of a model, and damage to them, without reading a tensor.

safetensors judges its own files, and the conversion a .gguf file. A flipped bit that leaves a
plausible number goes unnoticed: there is no checksum.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pdlaunch.config.model_files.shape import INDEX, ModelShape, read_json
from pdlaunch.errors import ConfigError

DOWNLOAD_AGAIN = (
    "Download the file again, and compare its size and SHA-256 with those at its source."
)
MAX_TOKENIZER_BYTES = 256 * 1024**2  # Several times the largest that are published, of 33 MB
_TENSOR = re.compile(
    # A multimodal file has the language model's below a name of its own.
    r"(?:language_model\.)?model\.(?:language_model\.)?(?:layers\.\d+\.)?"
    r"(embed_tokens|self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
# The first bytes of other content that is found in place of model files
_OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was never fetched "
    "(`git lfs pull`)",
    b"<": "an HTML or XML page, as servers send instead of a file",
}


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
    raise ConfigError(
        f"{model_dir} has no {_shorten(missing) or 'model*.safetensors'}"
        + (f", which {INDEX} names" if missing else ""),
        field="model",
        value=str(model_dir),
        fix="Complete the download; save checkpoints in other formats (pickles: *.bin, *.pt) as "
        "safetensors first: save_pretrained(DIR) of transformers.",
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
    known = (name for start, name in _OTHER_CONTENT.items() if head.startswith(start))
    content = next(known, f"unknown content (it begins with {head[:8].hex(' ')})")
    return f"it is no {kind} file but {content}" if head else "it is empty"


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"{path} cannot be read: {reason}", field="model", value=str(path))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_gguf(path: Path) -> None:
    """Raise ConfigError (field ``model``) for a file that is called .gguf and holds something else.

    What else may be wrong is found when it is converted.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not head.startswith(b"GGUF"):
        raise damaged(path, _described("GGUF", head))
