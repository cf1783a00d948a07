"""Completes words for a shell: values of settings, models, configuration files, rules."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from pathlib import Path

from pdlaunch.config.connectors import connector_names
from pdlaunch.config.model_files.find import ALIASES
from pdlaunch.config.settings import Setting

CONFIG_ENDINGS = (".yaml", ".yml", ".json")
"""Endings of a file with settings, as opposed to a model."""

Complete = Callable[[str], Iterable[str]]
"""Returns what the beginning of a value may become."""


def value_completion(setting: Setting) -> Complete | None:
    """Return the completion of a setting's values; None where any value may stand."""
    match setting.path:
        case "model":
            return complete_model
        case "kv_transfer.connector":
            return _one_of(connector_names())
        case _:
            return _one_of(setting.choices) if setting.choices else None


def complete_model(incomplete: str) -> list[str]:
    """Return aliases, folders and .gguf files."""
    return [*_one_of(ALIASES)(incomplete), *_files(incomplete, (".gguf",))]


def complete_target(incomplete: str) -> list[str]:
    """Return aliases, folders, .gguf files and configuration files."""
    return [*_one_of(ALIASES)(incomplete), *_files(incomplete, (".gguf", *CONFIG_ENDINGS))]


def complete_rule(incomplete: str) -> list[tuple[str, str]]:
    """Return the codes of rules with their titles."""
    from pdlaunch.checks.run import all_rules

    titles = {code: rule.title for code, rule in all_rules().items()}
    if incomplete[:1].islower():
        titles = {code.lower(): title for code, title in titles.items()}
    return [item for item in titles.items() if item[0].startswith(incomplete)]


def _one_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(values)

    def complete(incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return complete


def _files(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Return folders, with a slash behind, and files with one of ``endings``."""
    names = sorted(glob.glob(f"{glob.escape(incomplete)}*"))  # noqa: PTH207 - a prefix, no folder
    found = [Path(name) for name in names]
    return [
        f"{path}/" if path.is_dir() else str(path)
        for path in found
        if path.is_dir() or path.name.endswith(endings)
    ]
