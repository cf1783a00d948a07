"""Writes what a machine is to a file of JSON, and reads it elsewhere.

The file holds the fields of ``Machine``; those that are null or left out are not known. It holds no
secret, no name of a host or user, and no variable of the environment but those that rules read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pdlaunch.errors import ConfigError
from pdlaunch.machine.allocator_conf import VARIABLES
from pdlaunch.machine.facts import Fact, Machine, unknown_of_gpus

MOST_BYTES = 16 << 20
MOST_GPUS = 1024

_RECORDED = frozenset({*VARIABLES, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})
_PROBE_AGAIN = "correct it, or run `pdlaunch probe` on that machine again"
_FACTS: Mapping[str, Fact] = {
    "system": "system",
    "num_cpus": "cpus",
    "memory_bytes": "memory",
    "gpus": "gpus",
    "shm_free_bytes": "shm",
}
"""The fact that is not known where a field is null. Other fields may be left out of any machine."""


@dataclass(frozen=True, slots=True)
class AssumedMachine:
    """Holds a machine that is not this one, and the variables that were set on it."""

    name: str  # the profile, or the file
    machine: Machine
    environ: Mapping[str, str]
    about: str = ""  # a description of the machine and of what is taken for granted, for people


class _MachineFile(BaseModel):
    # In strict mode a memory of "80" is refused; the classes within have this configuration, too.
    model_config = ConfigDict(extra="forbid", strict=True)

    about: str = ""
    environment: dict[str, str] = {}
    machine: Machine


def encode_machine(machine: Machine, environ: Mapping[str, str], about: str = "") -> str:
    """Return the text of the file; of ``environ`` only what rules read is kept."""
    facts = asdict(machine)
    facts |= {name: None for name, fact in _FACTS.items() if fact in machine.unknown}
    file = {"about": about, **facts, "environment": recorded_environ(environ)}
    return f"{json.dumps(file, indent=2)}\n"


def read_machine_file(path: Path) -> AssumedMachine:
    """Read a file that ``encode_machine`` wrote, or a person. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read: {reason}", fix=_PROBE_AGAIN) from None
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{path} is too large for a description of a machine", fix=_PROBE_AGAIN)
    return decode_machine(text, str(path))


def decode_machine(text: bytes | str, name: str) -> AssumedMachine:
    """Return the machine that a file describes. Raises ConfigError naming field, value and fix."""
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {error}", fix=_PROBE_AGAIN) from None
    if not isinstance(raw, dict):
        raise _error(name, "", raw, "must hold an object with the facts of a machine")
    # Null and left out mean the same, so that a person can blank a fact of a probed machine.
    known = {field: value for field, value in raw.items() if value is not None}
    file = {field: known.pop(field) for field in ("about", "environment") if field in known}
    try:
        read = _MachineFile.model_validate_json(json.dumps(file | {"machine": known}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
        path = "".join(place).removeprefix(".machine").removeprefix(".")
        raise _error(name, path, first["input"], first["msg"]) from None
    gpus = read.machine.gpus
    if "gpus" not in known and "gpus" not in read.machine.unknown:
        fix = 'list the GPUs of the machine; "gpus": [] says that it has none'
        raise ConfigError(f"{name}: gpus is missing", field="gpus", fix=fix)
    if len(gpus) > MOST_GPUS:
        raise _error(name, "gpus", len(gpus), f"a machine has {MOST_GPUS} GPUs at most")
    unknown = {fact for field, fact in _FACTS.items() if field not in known}
    unknown |= unknown_of_gpus(gpus)
    told = {fact: read.machine.unknown.get(fact, f"{name} does not say") for fact in unknown}
    machine = replace(
        read.machine,
        # GPUs that were written by hand have the index that their place says.
        gpus=tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus)),
        unknown=dict(sorted(told.items())),
    )
    return AssumedMachine(name, machine, read.environment, read.about)


def recorded_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that rules read: of UCX, of CUDA's devices and of torch's allocator."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _RECORDED or name.startswith("UCX_")
    }


def _error(name: str, field: str, value: object, what: str) -> ConfigError:
    shown = json.dumps(value)
    short = shown if len(shown) <= 60 else f"{shown[:60]}..."
    place = f"{name}: {field}" if field else name
    return ConfigError(
        f"{place}: {what} (it is {short})", field=field or None, value=value, fix=_PROBE_AGAIN
    )
