"""Merges the sources of settings. Flags override ``PDLAUNCH_*`` variables, and these the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pdlaunch.config import settings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.problems import InvalidConfigError, Problem, nearest, shown, shown_name
from pdlaunch.config.vllm_arguments import value_of_text
from pdlaunch.config.yaml_file import read_yaml

# Variables that pdlaunch reads but that are not settings
OTHER_VARIABLES = frozenset({"PDLAUNCH_CACHE"})


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """Holds a configuration and the origin of each value that was given."""

    config: LaunchConfig
    # The flag, variable or place in the file, by dotted path; settings with defaults have no entry
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Given:
    """Holds the value of a setting in one source."""

    value: object
    origin: str  # the flag, the variable, or the place in the file
    # Places in the file of the value's entries (``deploy.yaml:3:5``), by dotted path
    places: Mapping[str, str] = field(default_factory=dict)


def load_config(
    path: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> LoadedConfig:
    """Merge all sources; ``flags`` has values by dotted path (``prefill.replicas``). Raises
    InvalidConfigError with the problems of all sources.
    """
    values, places, problems = ({}, {}, []) if path is None else read_yaml(path)
    given = {name: _Given(value, places[name], places) for name, value in values.items()}
    # Later sources win by path, not by section: a flag for one field of a section keeps the other
    # fields of that section in the file.
    given |= _from_environment(environ, problems)
    given |= _from_flags(flags, problems)
    config = _validate(given, problems)
    # Raise all problems at once, so that users correct a file once.
    if config is None or problems:
        raise InvalidConfigError(problems)
    return LoadedConfig(config, {path: item.origin for path, item in given.items()})


def _from_environment(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, _Given]:
    known, declared = settings.variable_paths(), settings.all_settings()
    given: dict[str, _Given] = {}
    # Sorted, so that equal environments give equal messages.
    for name in sorted(environ):
        if not name.startswith(settings.VARIABLE_PREFIX) or name in OTHER_VARIABLES:
            continue
        # Settings first: a mapping's entry PDLAUNCH_ENV__X must not hide a setting of that name.
        path = known.get(name) or _mapping_entry(name, known)
        if path is None:
            match = nearest(name, [*known, *OTHER_VARIABLES])
            fix = f"did you mean {match}?" if match else "docs/settings.md lists all variables"
            problems.append(Problem("unknown variable", fix=fix, where=shown_name(name)))
        elif path in declared and declared[path].is_mapping:
            message = "holds several entries, but a variable gives one"
            fix = f"set one variable for each: {name}__NAME=VALUE gives {path}.NAME"
            problems.append(Problem(message, path, fix=fix, where=name))
        elif path in given:
            message = f"gives {path}, and so does {given[path].origin}"
            problems.append(Problem(message, path, fix="unset one of them", where=name))
        # Refuse empty values: scripts pass on unset variables, and an empty api_key opens the API.
        elif not environ[name]:
            problems.append(
                Problem("is empty", path, fix=f"unset {name}, or give it a value", where=name)
            )
        else:
            parent = declared.get(path.rpartition(".")[0])
            has_flags = parent is not None and parent.holds_flags
            value = value_of_text(environ[name]) if has_flags else environ[name]
            given[path] = _Given(value, shown_name(name))
    return given


def _mapping_entry(name: str, known: Mapping[str, str]) -> str | None:
    """Return a mapping entry's path: ``prefill.env.A`` for ``PDLAUNCH_PREFILL__ENV__A``."""
    for variable, path in known.items():
        entry = name.removeprefix(f"{variable}__")
        if settings.all_settings()[path].is_mapping and entry not in (name, ""):
            return f"{path}.{entry}"
    return None


def _from_flags(flags: Mapping[str, object], problems: list[Problem]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for path, value in flags.items():
        if not {path, path.rpartition(".")[0]} & settings.all_settings().keys():
            match = nearest(path, settings.all_settings())
            fix = f"did you mean {match}?" if match else None
            problems.append(Problem("unknown field", shown_name(path), fix=fix))
        else:
            given[path] = _Given(value, settings.flag_name(path, value))
    return given


def _validate(given: Mapping[str, _Given], problems: list[Problem]) -> LaunchConfig | None:
    """Return the validated configuration, or None. Adds what the models refuse to ``problems``."""
    tree: dict[str, Any] = {}
    for path, item in given.items():
        setting = settings.all_settings().get(path)
        # pydantic would accept `port: yes` as port 1.
        if isinstance(item.value, bool) and setting is not None and not setting.is_switch:
            fix = "write it in quotes if it is a text"
            problems.append(_refused(path, item, "must not be a boolean", fix))
            continue
        *parents, name = settings.split_path(path)
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = item.value
    try:
        return LaunchConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_from_pydantic(detail, given) for detail in error.errors(include_url=False)]
        return None


def _from_pydantic(detail: ErrorDetails, given: Mapping[str, _Given]) -> Problem:
    # Validators of a whole section name the refused field in the error's context.
    field = detail.get("ctx", {}).get("field")
    whole = ".".join(map(str, (*detail["loc"], *([field] if field else ()))))
    path = whole
    while path and path not in given:
        path = path.rpartition(".")[0]
    # No source gives a value, so the default is the one that was refused.
    path = path or whole
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = f"has no field {shown_name(str(detail['loc'][-1]))}"
    message = message[:1].lower() + message[1:]
    if detail["type"].endswith("too_short") and detail["ctx"]["min_length"] == 1:
        message = "must not be empty"
    fix = None
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        values = [part for part in str(detail["ctx"]["expected"]).split("'") if part.isidentifier()]
        match = nearest(detail["input"].lower(), values)
        fix = f"did you mean {match}?" if match else None
    item = given.get(path)
    if item is not None and whole in item.places:
        item = _Given(item.value, item.places[whole])
    return _refused(path, item, message, fix)


def _refused(path: str, item: _Given | None, message: str, fix: str | None) -> Problem:
    if item is None:
        return Problem(message, path, fix=fix)
    setting = settings.all_settings().get(path)
    # Hide lists of mappings too: users may write a key into an entry, such as its URL.
    is_hidden = settings.is_secret(path) or (setting is not None and setting.has_sections)
    value = None if is_hidden else shown(item.value)
    if value is not None and not (isinstance(item.value, str) and value in message):
        message = f"{value} is wrong: {message}"
    return Problem(message, shown_name(path), value, fix, item.origin)


def shown_config(config: LaunchConfig) -> dict[str, Any]:
    """Return the whole configuration as JSON values, nested as in a file, with masked secrets."""
    return _masked(config.model_dump(mode="json"), "")


def _masked(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{section}{name}"
        if isinstance(value, dict):
            shown[name] = _masked(value, f"{path}.")
        else:
            is_hidden = value is not None and settings.is_secret(path)
            shown[name] = settings.SECRET if is_hidden else value
    return shown
