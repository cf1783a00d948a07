"""Prepares a configuration for people: plain values with their origins, secrets masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.config.settings import SECRET, all_settings, is_secret, split_path
from pdlaunch.config.sources import LoadedConfig, Origin


@dataclass(frozen=True, slots=True)
class ShownValue:
    """Holds a setting with its value and origin, as people see them."""

    path: str
    value: Any
    """A plain JSON value."""
    origin: Origin


def shown_values(loaded: LoadedConfig) -> list[ShownValue]:
    """Return every setting in the order of the models; a role's overrides only where given."""
    return [
        ShownValue(path, value, origin)
        for path, value, origin in _values(loaded)
        if value is not None or origin.kind != "default" or path.partition(".")[0] not in ROLES
    ]


def changed_values(loaded: LoadedConfig) -> list[ShownValue]:
    """Return the settings that were given another value than their default."""
    defaults = {path: value for path, value, _ in _values(LoadedConfig(LaunchConfig(), {}))}
    return [item for item in shown_values(loaded) if item.value != defaults.get(item.path)]


def shown_config(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the whole configuration, nested as in a file."""
    nested: dict[str, Any] = {}
    for path, value, _ in _values(loaded):
        *parents, name = split_path(path)
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def _values(loaded: LoadedConfig) -> Iterator[tuple[str, Any, Origin]]:
    for path, field in all_settings().items():
        value: Any = loaded.config
        for name in path.split("."):
            value = getattr(value, name, None)
        entries = (
            {f"{path}.{name}": entry for name, entry in value.items()}
            if field.is_mapping and value
            else {path: value}
        )
        for entry_path, entry in entries.items():
            origin = loaded.origins.get(entry_path, Origin("default"))
            if field.has_sections:
                entry = [item.model_dump(exclude_none=True) for item in entry]
            if is_secret(entry_path) and entry is not None:
                entry = SECRET
            yield entry_path, entry, origin
