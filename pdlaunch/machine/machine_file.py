"""Writes what a machine is to a file of JSON, and reads it elsewhere.

What is not known is null or left out. The file holds no secret, no name of a host or user, and no
variable of the environment but those that rules read (``recorded_environ``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pdlaunch.errors import ConfigError
from pdlaunch.machine.allocator_conf import VARIABLES
from pdlaunch.machine.cuda_driver import NO_DEVICE
from pdlaunch.machine.facts import (
    Availability,
    Fact,
    Gpu,
    Libraries,
    Limits,
    LinkedGpus,
    Machine,
    SharedMemory,
)
from pdlaunch.machine.host import format_cpu_list, parse_cpu_list

VERSION = 1
"""Raise it with every field that is added: an older pdlaunch must refuse what it cannot read."""
MOST_BYTES = 16 << 20
MOST_GPUS = 1024

_RECORDED = frozenset({*VARIABLES, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})
_PROBE_AGAIN = "correct it, or run `pdlaunch probe` on that machine again"
_PLACE = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<path>[^`]*)`", re.DOTALL)
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")

_FACTS: Mapping[str, Fact] = {
    "system": "system",
    "cpus": "cpus",
    "has_native_bf16": "native_bf16",
    "memory_bytes": "memory",
    "gpus": "gpus",
    "driver_cuda": "driver",
    "cumem": "cumem",
    "libraries": "libraries",
    "limits": "limits",
    "shm": "shm",
    "rdma_devices": "rdma",
}
"""The fact that is not known where a field is null. Fields that are not here may be null on any
machine.
"""


@dataclass(frozen=True, slots=True)
class AssumedMachine:
    """Holds a machine that is not this one, and the variables that were set on it."""

    name: str  # the profile, or the file
    machine: Machine
    environ: Mapping[str, str]
    about: str = ""


class MachineFile(msgspec.Struct, kw_only=True):
    """Defines the form of the file; null stands for what is not known."""

    version: int = VERSION
    about: str = ""  # a description of the machine and of what is taken for granted, for people
    system: str | None = None
    architecture: str | None = None
    cpus: str | None = None  # cores that a process may use, as Linux lists them: ``0-15,32-47``
    has_native_bf16: bool | None = None
    memory_bytes: int | None = None
    numa_nodes: tuple[str, ...] | None = None  # the cores of each NUMA node
    gpus: tuple[Gpu, ...] | None = None  # empty on a machine without GPUs
    gpu_links: tuple[LinkedGpus, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    driver_version: str | None = None
    cumem: Availability | None = None  # derived from the GPUs where it is left out
    rdma_devices: tuple[str, ...] | None = None
    limits: Limits | None = None
    shm: SharedMemory | None = None
    libraries: Libraries | None = None
    environment: dict[str, str] = {}
    unknown: dict[Fact, str] = {}
    """The reasons why facts are not known; counts only for fields that are null."""


def encode_machine(machine: Machine, environ: Mapping[str, str], about: str = "") -> str:
    """Return the text of the file; of ``environ`` only what rules read is kept."""
    numa, missing = machine.numa_nodes, machine.unknown
    file = MachineFile(
        about=about,
        system=machine.system,
        architecture=machine.architecture,
        cpus=format_cpu_list(machine.cpus),
        has_native_bf16=machine.has_native_bf16,
        memory_bytes=machine.memory_bytes,
        numa_nodes=None if numa is None else tuple(map(format_cpu_list, numa)),
        gpus=machine.gpus,
        gpu_links=machine.gpu_links,
        driver_cuda=machine.driver_cuda,
        driver_version=machine.driver_version,
        cumem=machine.cumem,
        rdma_devices=machine.rdma_devices,
        limits=machine.limits,
        shm=machine.shm,
        libraries=machine.libraries,
        environment=recorded_environ(environ),
        unknown=dict(missing),
    )
    for name, fact in _FACTS.items():
        if fact in missing:
            setattr(file, name, None)
    return msgspec.json.format(msgspec.json.encode(file, order="deterministic")).decode() + "\n"


def read_machine_file(path: Path) -> AssumedMachine:
    """Read a file that ``encode_machine`` wrote, or a person. Raises ConfigError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{path} is too large for a description of a machine", fix=_PROBE_AGAIN
            )
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read: {reason}", fix=_PROBE_AGAIN) from None
    return decode_machine(text, str(path))


def decode_machine(text: bytes | str, name: str) -> AssumedMachine:
    """Return the machine that a file describes. Raises ConfigError naming field, value and fix."""
    try:
        raw: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ConfigError(f"{name} is not JSON: {error}", fix=_PROBE_AGAIN) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{name} must hold an object with the facts of a machine", value=raw, fix=_PROBE_AGAIN
        )
    _require_version(raw, name)
    _number_gpus(raw)
    try:
        file = msgspec.convert(raw, MachineFile)
    except msgspec.ValidationError as error:
        raise _refused(name, str(error), raw) from None
    if unknown := _unknown_field(raw, msgspec.to_builtins(file)):
        raise _error(name, unknown, _value_at(raw, unknown), "unknown field")
    return AssumedMachine(name, _machine(file, name), file.environment, file.about)


def recorded_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that rules read: of UCX, of CUDA's devices and of torch's allocator.

    Variables of vLLM are named without their values, which can be secrets.
    """
    found = {
        name: value
        for name, value in environ.items()
        if name in _RECORDED or name.startswith("UCX_")
    }
    of_vllm = {name: "" for name in environ if name.startswith("VLLM_")}
    return dict(sorted((found | of_vllm).items()))


def unknown_of_gpus(gpus: Iterable[Gpu]) -> set[Fact]:
    """Return the facts that are not known of all these GPUs."""
    of_gpus: dict[Fact, list[object]] = {
        "gpu_memory": [gpu.memory_bytes for gpu in gpus],
        "fabric": [gpu.has_fabric_handles for gpu in gpus],
    }
    return {fact for fact, values in of_gpus.items() if None in values}


def _machine(file: MachineFile, name: str) -> Machine:
    reason = f"{name} does not say"
    gpus = file.gpus or ()
    cumem = file.cumem or (Availability(False, NO_DEVICE) if file.gpus == () else None)
    unknown = {fact for field, fact in _FACTS.items() if getattr(file, field) is None}
    unknown |= unknown_of_gpus(gpus)
    if cumem is not None:
        unknown.discard("cumem")
    if not gpus:
        # A machine without GPUs has no driver, which is no gap.
        unknown.discard("driver")
    default = Machine()
    _require_gpus(file, name)
    return Machine(
        system=file.system or default.system,
        architecture=file.architecture or default.architecture,
        cpus=default.cpus if file.cpus is None else _cpus(name, "cpus", file.cpus),
        has_native_bf16=bool(file.has_native_bf16),
        memory_bytes=file.memory_bytes or 0,
        gpus=gpus,
        gpu_links=file.gpu_links,
        driver_cuda=file.driver_cuda,
        driver_version=file.driver_version,
        numa_nodes=None
        if file.numa_nodes is None
        else tuple(
            _cpus(name, f"numa_nodes[{index}]", node) for index, node in enumerate(file.numa_nodes)
        ),
        cumem=cumem or default.cumem,
        libraries=file.libraries or default.libraries,
        limits=file.limits or default.limits,
        shm=file.shm or default.shm,
        rdma_devices=file.rdma_devices or (),
        unknown={fact: file.unknown.get(fact, reason) for fact in sorted(unknown)},
    )


def _require_version(raw: Mapping[str, Any], name: str) -> None:
    version = raw.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _error(name, "version", version, f"must be the version of the format, {VERSION}")
    if version > VERSION:
        raise ConfigError(
            f"{name}: version {version} was written by a newer pdlaunch; this one reads up to "
            f"version {VERSION}",
            field="version",
            value=version,
            fix="update pdlaunch here, or run `pdlaunch probe` of this version on that machine",
        )


def _number_gpus(raw: dict[str, Any]) -> None:
    """Give GPUs that were written by hand the index that their place says."""
    gpus = raw.get("gpus")
    for index, gpu in enumerate(gpus if isinstance(gpus, list) else ()):
        if isinstance(gpu, dict):
            gpu.setdefault("index", index)


def _require_gpus(file: MachineFile, name: str) -> None:
    """Refuse GPUs that no machine has; without any word on them nothing could be planned."""
    if file.gpus is None:
        if "gpus" in file.unknown:
            return
        raise ConfigError(
            f"{name}: gpus is missing",
            field="gpus",
            fix='list the GPUs of the machine; "gpus": [] says that it has none',
        )
    if len(file.gpus) > MOST_GPUS:
        raise _error(name, "gpus", len(file.gpus), f"a machine has {MOST_GPUS} GPUs at most")
    for place, gpu in enumerate(file.gpus):
        if gpu.index != place:
            raise _error(name, f"gpus[{place}].index", gpu.index, f"must be {place}")
        for field in ("memory_bytes", "free_memory_bytes"):
            size = getattr(gpu, field)
            if size is not None and size < 0:
                raise _error(name, f"gpus[{place}].{field}", size, "must not be negative")
    for place, link in enumerate(file.gpu_links):
        if not 0 <= link.first < link.second < len(file.gpus):
            field = f"gpu_links[{place}]"
            raise _error(name, field, [link.first, link.second], "must join two of the GPUs")


def _cpus(name: str, field: str, text: str) -> tuple[int, ...]:
    try:
        return parse_cpu_list(text)
    except ValueError as error:
        raise _error(name, field, text, str(error)) from None


def _refused(name: str, message: str, raw: object) -> ConfigError:
    """Turn msgspec's message into one with field and value."""
    match = _PLACE.fullmatch(message)
    what, path = (match["what"], match["path"]) if match else (message, "")
    field = path.removeprefix(".")
    return _error(name, field, _value_at(raw, field), what)


def _error(name: str, field: str, value: object, what: str) -> ConfigError:
    shown = msgspec.json.encode(value).decode()
    short = shown if len(shown) <= 60 else f"{shown[:60]}..."
    place = f"{name}: {field}" if field else name
    return ConfigError(
        f"{place}: {what} (it is {short})", field=field, value=value, fix=_PROBE_AGAIN
    )


def _value_at(raw: Any, path: str) -> Any:
    for name, index in _STEP.findall(path):
        try:
            raw = raw[name] if name else raw[int(index)]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _unknown_field(raw: Any, known: Any, path: str = "") -> str | None:
    """Return the path of the first key of ``raw`` that was not read; None: all were."""
    if isinstance(raw, dict) and isinstance(known, dict):
        for key, value in raw.items():
            place = f"{path}.{key}" if path else str(key)
            if key not in known:
                return place
            if found := _unknown_field(value, known[key], place):
                return found
    elif isinstance(raw, list) and isinstance(known, list | tuple):
        for index, (value, read) in enumerate(zip(raw, known, strict=False)):
            if found := _unknown_field(value, read, f"{path}[{index}]"):
                return found
    return None
