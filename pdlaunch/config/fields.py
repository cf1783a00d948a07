"""The dotted paths of ``LaunchConfig`` and what stands behind each; derived from the models,
nothing is listed twice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from pdlaunch.config.models import FrozenModel, LaunchConfig

SECRET = "**********"
"""Stands for a secret wherever values are shown."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Field:
    """A setting. ``is_mapping``: its entries are settings of their own (``env.UCX_TLS``);
    ``is_list``: one value of several.
    """

    path: str
    is_mapping: bool
    is_list: bool
    is_secret: bool
    info: FieldInfo


@functools.cache
def all_fields() -> Mapping[str, Field]:
    """Every setting by dotted path, in the order of the models."""
    return {field.path: field for field in _walk(LaunchConfig, "")}


@functools.cache
def sections() -> Mapping[str, type[FrozenModel]]:
    """Parts of the file that hold settings: ``""`` (the top level), ``prefill``,
    ``prefill.kv_offload``, ...
    """
    return {"": LaunchConfig, **dict(_walk_sections(LaunchConfig, ""))}


def is_secret(path: str) -> bool:
    """The value at this path must not be shown: API keys, and environment variables that look like
    one.
    """
    field = all_fields().get(path)
    if field is not None:
        return field.is_secret
    parent, _, name = path.rpartition(".")
    return parent in all_fields() and _SECRET_NAME.search(name) is not None


def split_path(path: str) -> list[str]:
    """Parts of a dotted path; the entry of a mapping may hold dots itself."""
    for field in all_fields().values():
        if field.is_mapping and path.startswith(f"{field.path}."):
            return [*field.path.split("."), path.removeprefix(f"{field.path}.")]
    return path.split(".")


def known_names(section: str) -> list[str]:
    """Names that may stand in a section of the file."""
    return list(sections()[section].model_fields)


def _walk(model: type[FrozenModel], prefix: str) -> list[Field]:
    found = []
    for name, info in model.model_fields.items():
        section = _section(info)
        if section is not None:
            found += _walk(section, f"{prefix}{name}.")
        else:
            kinds = _kinds(info.annotation)
            found.append(
                Field(f"{prefix}{name}", dict in kinds, tuple in kinds, SecretStr in kinds, info)
            )
    return found


def _walk_sections(
    model: type[FrozenModel], prefix: str
) -> Iterator[tuple[str, type[FrozenModel]]]:
    for name, info in model.model_fields.items():
        if section := _section(info):
            yield f"{prefix}{name}", section
            yield from _walk_sections(section, f"{prefix}{name}.")


def _section(info: FieldInfo) -> type[FrozenModel] | None:
    annotation = info.annotation
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, FrozenModel) else None
    )


def _kinds(annotation: Any) -> set[Any]:
    """The alternatives of a type such as ``dict[str, str] | None``, without their parameters."""
    origin = get_origin(annotation)
    if origin is None or origin in (dict, tuple):
        return {origin or annotation}
    return {kind for part in get_args(annotation) for kind in _kinds(part)}
