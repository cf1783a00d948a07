"""Derives all settings, with their flags and variables, from the fields of ``LaunchConfig``."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, JsonValue, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pdlaunch.config.connectors import other_sections
from pdlaunch.config.field_types import Flag, FrozenModel, section_of
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sizes import format_size, parse_size

SECRET = "**********"  # Replaces secrets in messages and in the shown configuration
VARIABLE_PREFIX = "PDLAUNCH_"

# The section that has one section for each connector, including connectors of other packages
_CONNECTORS = "kv_transfer"
SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_FORMS = {
    SecretStr: "KEY",
    parse_size: "SIZE",
    bool: "on|off",
    dict: "MAPPING",
    int: "N",
    float: "X",
    tuple: "LIST",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Describes one setting: its dotted path and its field."""

    path: str
    info: FieldInfo
    # The alternatives of the field's type: classes, values of a ``Literal``, and ``parse_size`` for
    # a number of bytes
    kinds: tuple[Any, ...]

    @property
    def is_mapping(self) -> bool:
        return dict in self.kinds

    @property
    def holds_flags(self) -> bool:
        """Return True for ``engine_args``, whose entries are flags: booleans, texts, or JSON."""
        return JsonValue in self.kinds

    @property
    def has_sections(self) -> bool:
        item = next(iter(get_args(self.info.annotation)), None)
        model = get_args(item)[0] if get_origin(item) is Annotated else item
        return isinstance(model, type) and issubclass(model, FrozenModel)

    @property
    def is_switch(self) -> bool:
        return bool in self.kinds

    @property
    def is_size(self) -> bool:
        return parse_size in self.kinds

    @property
    def is_secret(self) -> bool:
        return SecretStr in self.kinds

    @property
    def description(self) -> str:
        return self.info.description or ""

    @property
    def default(self) -> str:
        """Return the default as a user would write it; empty if there is none."""
        value = self.info.default
        if value is None or value is PydanticUndefined or value in ("", ()):
            return ""
        # Checked before numbers, because a bool is an int too.
        if isinstance(value, bool):
            return "on" if value else "off"
        if self.is_size and value:
            return format_size(value).replace(" ", "")
        return f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def choices(self) -> list[str]:
        return [kind for kind in self.kinds if isinstance(kind, str)]

    @property
    def form(self) -> str:
        """Return the form of the value for help and docs: ``N``, ``SIZE``, ``auto|cpu|cuda``."""
        if self.choices:
            return "|".join(self.choices)
        if self.path.endswith("_s"):
            return "SECONDS"
        return next((form for kind, form in _FORMS.items() if kind in self.kinds), "TEXT")

    @property
    def flag(self) -> Flag | None:
        """Return the flag, with all its texts filled in; None if the setting has no flag."""
        declared = next((item for item in self.info.metadata if isinstance(item, Flag)), None)
        if declared is None:
            return None
        section, _, field = self.path.rpartition(".")
        name = (declared.name or field.replace("_", "-")).format(role=section)
        text = (declared.help or self.description).format(role=section)
        if self.is_secret:
            text += f" {variable_name(name)} keeps it out of ps."
        elif self.default not in ("", "off"):
            text += f" Default: {self.default}{f'; --no-{name}' if self.is_switch else ''}."
        return replace(declared, name=name, metavar=declared.metavar or self.form, help=text)

    @property
    def variables(self) -> list[str]:
        """Return the environment variables of the setting, named after its flag and its path."""
        flag = self.flag
        names = [flag.name, self.path] if flag else [self.path]
        return list(dict.fromkeys(map(variable_name, names)))


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Return every setting by dotted path, in the order of the models."""
    return {
        path: Setting(path, found, tuple(_kinds(found.annotation, found.metadata)))
        for path, found in _fields()
        if isinstance(found, FieldInfo)
    }


@functools.cache
def sections() -> Mapping[str, Sequence[str]]:
    """Return the names in each section: ``""`` (the top level), ``prefill.kv_offload``, ..."""
    models = {path: [*found.model_fields] for path, found in _fields() if isinstance(found, type)}
    models[_CONNECTORS] += other_sections()
    return models


@functools.cache
def all_flags() -> Mapping[str, Flag]:
    """Return all flags by the dotted path of their settings."""
    return {path: flag for path, setting in all_settings().items() if (flag := setting.flag)}


def flag_name(path: str, value: object = None) -> str:
    """Return a setting's flag with its dashes (``--no-`` for a switch that is off), or the dotted
    path of a setting without a flag.
    """
    flag = all_flags().get(path)
    if flag is None:
        return path
    switched_off = value is False and all_settings()[path].is_switch
    return f"--no-{flag.name}" if switched_off else f"--{flag.name}"


@functools.cache
def variable_paths() -> Mapping[str, str]:
    """Return the setting's dotted path for each ``PDLAUNCH_*`` variable."""
    return {name: path for path, setting in all_settings().items() for name in setting.variables}


def is_secret(path: str) -> bool:
    """Return True if a value must be masked: API keys, and entries of ``env`` named like a key."""
    setting = all_settings().get(path)
    if setting is not None:
        return setting.is_secret
    parent, _, name = path.rpartition(".")
    return parent in all_settings() and SECRET_NAME.search(name) is not None


def split_path(path: str) -> list[str]:
    """Split a dotted path, but not the name of a mapping's entry, which may have dots."""
    parts = path.split(".")
    settings = all_settings()
    # For example, `env.A.B` sets the variable `A.B`; there is no section `env.A`.
    for depth in range(1, len(parts)):
        setting = settings.get(".".join(parts[:depth]))
        if setting is not None and setting.is_mapping:
            return [*parts[:depth], ".".join(parts[depth:])]
    return parts


def variable_name(name: str) -> str:
    """Return the ``PDLAUNCH_*`` variable for a dotted path, or for a flag without its dashes."""
    return f"{VARIABLE_PREFIX}{name.replace('.', '__').replace('-', '_').upper()}"


def _fields() -> Iterator[tuple[str, FieldInfo | type[FrozenModel]]]:
    """Yield the path of each setting and section, connectors of other packages included."""
    yield from _walk(LaunchConfig, "")
    for name, model in other_sections().items():
        yield from _walk(model, f"{_CONNECTORS}.{name}")


def _walk(
    model: type[FrozenModel], path: str
) -> Iterator[tuple[str, FieldInfo | type[FrozenModel]]]:
    yield path, model
    for name, info in model.model_fields.items():
        inner = f"{path}.{name}" if path else name
        if section := section_of(info):
            yield from _walk(section, inner)
        else:
            yield inner, info


def _kinds(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Any]:
    # pydantic moves metadata of an annotation into the field, but not metadata of a union's parts.
    yield from (item.func for item in metadata if isinstance(item, BeforeValidator))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(arguments[0], arguments[1:])
    elif origin is Literal:
        yield from arguments
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from _kinds(part)
    else:
        yield origin or annotation
        if JsonValue in arguments:
            yield JsonValue
