"""Gives the rules PD6xx what they look at: engines of vLLM, and their flags by long name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pdlaunch.checks.context import Context
from pdlaunch.config.vllm_arguments import long_name, vllm_flag_name
from pdlaunch.planning.role_engines import RoleEngines


@dataclass(frozen=True, slots=True)
class EngineArgument:
    """Holds one entry of ``engine_args``."""

    key: str
    """The name as it was written."""
    name: str
    """The long name of vLLM's flag."""
    value: JsonValue
    where: str
    """The setting that gives it."""

    @property
    def is_off(self) -> bool:
        """Return whether it switches its flag off."""
        return self.value is self._is_negated

    @property
    def _is_negated(self) -> bool:
        return vllm_flag_name(self.key).startswith("no-")

    @property
    def json(self) -> JsonValue:
        """Return its value, read where it is the text of a JSON object."""
        if isinstance(self.value, str) and self.value.startswith("{"):
            try:
                found: JsonValue = json.loads(self.value)
            except ValueError:
                return self.value
            return found
        return self.value


def vllm_engines(context: Context) -> Iterator[RoleEngines]:
    """Return the engines of vLLM."""
    return (engines for engines in context.engines.values() if engines.settings.engine == "vllm")


def vllm_pair(context: Context) -> tuple[RoleEngines, RoleEngines] | None:
    """Return the prefill and the decode side, where both are of vLLM."""
    pair = context.pair()
    is_pair = pair is not None and all(side.settings.engine == "vllm" for side in pair)
    return pair if is_pair else None


def arguments(context: Context, engines: RoleEngines) -> Iterator[EngineArgument]:
    """Return what ``engine_args`` gives engines, the role's own entries over the top level."""
    for key, value in engines.settings.engine_args.items():
        yield EngineArgument(key, long_name(key), value, _place(context, engines, key))


def by_name(context: Context, engines: RoleEngines) -> Mapping[str, JsonValue]:
    """Return the flags of engines by long name and, of single keys of a JSON value, their path."""
    values: dict[str, JsonValue] = {}
    for argument in arguments(context, engines):
        _, _, path = argument.key.partition(".")
        value = False if argument.is_off else argument.json
        values[f"{argument.name}.{path}".rstrip(".")] = value
    return values


def place(context: Context, engines: RoleEngines, name: str) -> str:
    """Return the setting that gives a flag of this long name; ``engine_args`` where none does."""
    found = (each.where for each in arguments(context, engines) if each.name == name)
    return next(found, engines.where("engine_args"))


def _place(context: Context, engines: RoleEngines, key: str) -> str:
    paths = (f"{engines.role}.engine_args.{key}", f"engine_args.{key}")
    return next((path for path in paths if context.given(path)), paths[1])
