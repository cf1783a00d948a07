"""Types for declaring settings. Each setting is one field of a frozen pydantic model.

The field's type and constraints check the value, the description explains the setting, and a
``Flag`` in the annotation gives it a command-line flag. ``config.settings`` derives the rest.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from pdlaunch.config.sizes import parse_size

ModelType = TypeVar("ModelType", bound="FrozenModel")


class FrozenModel(BaseModel):
    """Base class of all settings models: frozen, no unknown fields, validated defaults."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True)
class Flag:
    """Adds a command-line flag to a setting, and a ``PDLAUNCH_*`` variable of the same name."""

    # The flag without its dashes; the field's name when empty. ``{role}`` is replaced by the
    # section that holds the field.
    name: str = ""
    panel: str = "Engines"  # The heading in ``pdlaunch serve --help``
    metavar: str = ""  # The form of the value in help; follows from the type when empty
    help: str = ""  # The text in help; the field's description when empty. May have ``{role}``.
    of_role: "Flag | None" = None  # The flag of a role's override; None for no flag
    # ``pdlaunch router`` has the flag too, because the setting matters to a router without a launch
    for_router: bool = False


NATIVE_ALONE = "native alone"  # An annotation that marks settings which only native engines read


# A number of bytes: ``4GiB`` (powers of 1024), ``4GB`` (powers of 1000) or a plain integer
ByteSize = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]

# A number of bytes like ``ByteSize``, or 0 for none
OptionalSize = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]


def _read_switch(value: object) -> object:
    """Turn ``on`` and ``off`` of flags and variables into booleans, as YAML does for a file."""
    if isinstance(value, str) and value.lower() in ("on", "off"):
        return value.lower() == "on"
    return value


Switch = Annotated[bool, BeforeValidator(_read_switch)]


def read_list(value: object) -> object:
    """Split a text with commas, the form of lists in flags and variables; keep other values."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError("this is not the name of an environment variable")
    return name


def _check_flag(name: str) -> str:
    if not re.fullmatch(r"-{0,2}[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+\+?)?", name):
        raise ValueError("this is not the name of a flag; write it as in vLLM's help")
    return name


VariableName = Annotated[str, AfterValidator(_check_variable)]
FlagName = Annotated[str, AfterValidator(_check_flag)]

MIN_PORTS = 16  # Libraries try random ports in the range and fail after a few that are in use


def _check_port_range(text: str) -> str:
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise ValueError(f"{text[:40]!r} is not a port range; write FIRST-LAST, as 21000-21999")
    if not 1024 <= int(first) <= int(last) <= 65535:
        raise ValueError(f"{text[:40]!r} must be within 1024-65535, the lower port first")
    if int(last) - int(first) + 1 < MIN_PORTS:
        raise ValueError(f"{text[:40]!r} has fewer than {MIN_PORTS} ports; widen it")
    return f"{int(first)}-{int(last)}"


PortRange = Annotated[str, AfterValidator(_check_port_range)]  # ``FIRST-LAST``, both included


def may_override(model: type[FrozenModel]) -> Callable[[type[ModelType]], type[ModelType]]:
    """Return a class decorator that adds the fields of ``model``, each None by default."""

    def add(own: type[ModelType]) -> type[ModelType]:
        # Real fields rather than a dict, so schema, flags and messages name each override.
        return create_model(
            own.__name__, __base__=own, __module__=own.__module__, **_optional_fields(model)
        )

    return add


def override(settings: ModelType, overrides: FrozenModel) -> ModelType:
    """Return ``settings`` with the values set in ``overrides``. Mappings are merged by entry."""
    # Fields are matched by name, because `overrides` may have fields that `settings` lacks.
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    for name, mine in values.items():
        match getattr(overrides, name):
            case None:
                pass
            case FrozenModel() as section:
                values[name] = override(mine, section)
            case dict() as entries:
                values[name] = mine | entries
            case value:
                values[name] = value
    # Validate again: a role's value may not fit together with one of the top level.
    return type(settings).model_validate(values)


def set_paths(settings: FrozenModel) -> Iterator[str]:
    """Yield the dotted paths of all fields that are not None."""
    for name, value in settings:
        if isinstance(value, FrozenModel):
            yield from (f"{name}.{path}" for path in set_paths(value))
        elif value is not None:
            yield name


def section_of(info: FieldInfo) -> type[FrozenModel] | None:
    """Return the model of a field that is a section of the file; None for a single setting."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, FrozenModel) else None


def _optional_fields(model: type[FrozenModel]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if section := section_of(info):
            part: Any = create_model(
                f"{section.__name__}Overrides", __base__=FrozenModel, **_optional_fields(section)
            )
            fields[name] = (part, part())
            continue
        # Put the constraints on the value's part of the union, so None passes.
        kind: Any = info.annotation
        for item in info.metadata:
            if not (isinstance(item, Flag) or item == NATIVE_ALONE):
                kind = Annotated[kind, item]
        kind = kind | None
        for item in info.metadata:
            if isinstance(item, Flag) and item.of_role is not None:
                kind = Annotated[kind, item.of_role]
        fields[name] = (kind, Field(None, description=info.description))
    return fields
