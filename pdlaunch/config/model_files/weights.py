"""Finds the files of a model, checks them for damage without reading tensors, and identifies them.

The safetensors library checks safetensors files; the conversion checks .gguf files. Flipped bits in
tensors are not noticed, because the formats have no checksum.

A launch pins digests of a model's files at its first start. Weights are sampled, so that a start
does not read them twice: size and header of each file, and the start, middle and end of each
tensor. A change of a few bytes elsewhere is not noticed.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pdlaunch.config.model_files.shape import INDEX, OUTPUT_LAYER, ModelShape, read_json
from pdlaunch.errors import ConfigError

DOWNLOAD_AGAIN = (
    "Download the file again, and compare its size and SHA-256 with those at its source."
)
MAX_TEXT_BYTES = 256 * 1024**2  # The largest published tokenizer.json has 33 MB
# Prefixes of the names of other files that affect answers: tokenizer, templates, defaults
TEXT_PREFIXES = (
    *("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece", "tekken"),
    *("chat_template", "generation_config", "preprocessor", "processor"),
)
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.(.+)", re.ASCII)
# Names of the language model's weights in multimodal checkpoints -> names in the model
_WRAPPED_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_IGNORED_PREFIXES = (
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
# First bytes of other content that users sometimes have in place of model files
_OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was never downloaded "
    "(`git lfs pull`)",
    b"<": "an HTML or XML page, as servers send instead of a file",
}
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


def damaged(path: Path, what: str, *, fix: str = DOWNLOAD_AGAIN) -> ConfigError:
    """Return the error for a damaged file of a model."""
    return ConfigError(f"{path} is damaged: {what}", field="model", value=str(path), fix=fix)


def weight_files(model_dir: Path) -> list[Path]:
    """Return the checkpoint's safetensors files. Raises ConfigError, also for damaged ones."""
    index = model_dir / INDEX
    # Prefer the index to a glob: folders often hold a second, merged copy of the weights.
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
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    raise ConfigError(
        f"{model_dir} has no {names or 'model*.safetensors'}"
        + (f", which {INDEX} names" if missing and index.is_file() else ""),
        field="model",
        value=str(model_dir),
        fix="Complete the download; save checkpoints in other formats (pickles: *.bin, *.pt) as "
        "safetensors first: save_pretrained(DIR) of transformers.",
    )


def check_files(model_dir: Path, shape: ModelShape | None) -> None:
    """Check names and shapes of the weights against config.json, and the files for text, before a
    rank loads torch. ``shape`` is None or an outline for vLLM, which reads all shapes and formats.
    Raises ConfigError.
    """
    if shape is not None and not shape.is_outline:
        _check_weights(weight_files(model_dir), shape)
    elif any(model_dir.glob("model*.safetensors*")):
        weight_files(model_dir)
    for file in sorted(model_dir.iterdir()):
        if not file.name.startswith(TEXT_PREFIXES) or file.is_dir():
            continue
        if file.name in ("tokenizer.json", "tokenizer_config.json"):
            read_json(file, MAX_TEXT_BYTES)
        elif not file.is_file() or file.stat().st_size > MAX_TEXT_BYTES:
            raise damaged(file, f"not a regular file, or larger than {MAX_TEXT_BYTES} bytes")


def name_in_model(key: str) -> str | None:
    """Return a checkpoint weight's name in the language model; None: it is not a part of this."""
    if key.startswith(_IGNORED_PREFIXES) or key.endswith(_IGNORED_SUFFIX):
        return None
    for wrapped, own in _WRAPPED_PREFIXES:
        if key.startswith(wrapped):
            return own + key.removeprefix(wrapped)
    return key


def _check_weights(files: Sequence[Path], shape: ModelShape) -> None:
    """Check that the files have exactly the weights of the language model, in the right shapes."""
    fix, seen = "Download weights and config.json of one revision.", set[str]()
    for file in files:
        for key, found in _tensor_shapes(file):
            name = name_in_model(key)
            # A tied output layer is the embedding under a second name.
            if name is None or (name == OUTPUT_LAYER and shape.tie_word_embeddings):
                continue
            right = shape.other_weights.get(name)
            if (match := _LAYER.fullmatch(name)) and int(match[1]) < shape.num_layers:
                right = shape.layer_weights.get(match[2])
            if right is None:
                raise damaged(file, f"config.json describes a model without {key}", fix=fix)
            if found != list(right):
                what = f"{key} has the shape {found}, but config.json says {list(right)}"
                raise damaged(file, what, fix=fix)
            seen.add(name)
    layers = [f"model.layers.{layer}" for layer in range(shape.num_layers)]
    names = [f"{layer}.{name}" for layer in layers for name in shape.layer_weights]
    if missing := next((name for name in (*shape.other_weights, *names) if name not in seen), ""):
        raise damaged(files[0].parent, f"no file has {missing}, which config.json needs", fix=fix)


def _tensor_shapes(path: Path) -> list[tuple[str, list[int]]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118


def names_in(index: Path) -> list[str]:
    """Return the names of the files in an index. Raises ConfigError if it cannot be read."""
    try:
        if index.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"larger than {MAX_TEXT_BYTES} bytes")
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        # Refuse paths: an index from the hub must not make pdlaunch read other local files.
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
        # Opening the file checks its header and compares it with the file's length.
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
    return f"it is not a {kind} file but {content}" if head else "it is empty"


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"{path} cannot be read: {reason}", field="model", value=str(path))


def check_gguf(path: Path) -> None:
    """Raise ConfigError if a file does not begin like a .gguf file; the conversion checks more."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not head.startswith(b"GGUF"):
        raise damaged(path, _described("GGUF", head))


def weight_digests(model_dir: Path, *, dummy: bool = False) -> dict[str, str]:
    """Return the SHA-256 (hex) of config.json and, unless they are random (``dummy``), of samples
    of each safetensors file, by name. Raises ConfigError.
    """
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
    return digests


def sampled_digests(model: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of size and samples of each file of weights, and of config.json, by
    name. ``model`` is a folder or a single file.
    """
    return {
        file.name: sampled_digest(file)
        for file in _files(model)
        if file.suffix in _WEIGHTS or file.name in _CONFIGS
    }


def named_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of a file, or of each file in a folder, by path. Weights are sampled
    as in ``sampled_digests``.
    """
    return {
        str(file.absolute()): sampled_digest(file) if file.suffix in _WEIGHTS else _digest(file)
        for file in _files(path)
        if file.is_file()
    }


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sampled_digest(file: Path) -> str:
    """Return the SHA-256 (hex) of a file's size and samples: 40 GB would take a minute."""
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
        # The format: length of the header, header in JSON, tensors.
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
