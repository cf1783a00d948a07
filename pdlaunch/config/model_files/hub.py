"""Names of models on a hub, and what the cache of huggingface_hub holds of them.

Whatever a name or a revision says, the paths made of it stay inside that cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from pdlaunch.errors import ConfigError

Part = Literal["description", "weights"]
"""The parts that are downloaded at once: all small files, or the weights that they describe."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_ENDINGS = (".gguf", ".json", ".yaml", ".yml", ".safetensors", ".git")


def _check_revision(value: str) -> str:
    if not _REVISION.fullmatch(value) or ".." in value:
        raise ValueError("must be a branch, a tag or a commit of the model's repository")
    return value


Revision = Annotated[str, AfterValidator(_check_revision)]
"""A branch, a tag or a commit of a repository."""


class NotDownloadedError(ConfigError):
    """The cache holds nothing of a model of the hub, or too little to describe it."""


def is_hub_name(model: str) -> bool:
    """Say whether ``model`` has the form of a name on a hub: ``Qwen/Qwen3-0.6B``."""
    return (
        _NAME.fullmatch(model) is not None
        and ".." not in model
        and "--" not in model
        and not model.lower().endswith(_FILE_ENDINGS)
    )


def cached_snapshot(name: str, revision: str | None) -> Path:
    """Return the folder with the files of a model of the hub; asks no network.

    Raises NotDownloadedError when the cache has no description of it.
    """
    cache = cache_folder()
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = revision or "main"
    commit = revision
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
    """Return the error of a model that is not in the cache."""
    at = "" if revision in (None, "main") else f" at revision {revision}"
    return NotDownloadedError(
        f"model {name!r}{at} is not in the cache {cache_folder()}, and no directory has that name",
        field="model",
        value=name,
        fix="HF_HUB_OFFLINE forbids to download it: unset that, or name a directory that has it."
        if is_offline()
        else f"`hf download {name}` fetches it into the cache, and `pdlaunch serve` does.",
    )


def cache_folder() -> Path:
    """Return the cache of huggingface_hub: HF_HUB_CACHE, else HF_HOME/hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Say whether HF_HUB_OFFLINE forbids to ask a hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
