"""Reads CUDA_VISIBLE_DEVICES as CUDA does, for a process that is yet to be started.

CUDA goes through the list until an entry that it cannot use, and forgets the rest; a GPU that is
named twice is an error. What it would drop in silence is a problem here.

Source: tried with the driver of CUDA 13 on two H200s; CUDA's programming guide for MIG devices, of
which a process sees one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.machine.facts import Gpu

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_UUID = re.compile(r"(GPU|MIG)-.", re.IGNORECASE)
_END_OF_LIST = re.compile(r"-\d+|")


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """Holds the GPUs that a process sees; its ``cuda:0`` is the first."""

    gpus: tuple[Gpu, ...]
    """A GPU that only such a process sees has index -1, and nothing is known of it."""
    problem: str = ""  # the fault of the variable; empty when it has none


def visible_gpus(gpus: Sequence[Gpu], outer: str | None, own: str | None) -> VisibleGpus:
    """Return which of the launch's GPUs a process sees whose variable is ``own``.

    ``gpus`` are those that the launch itself sees with ``outer``. As in any process, numbers are
    those of the machine, and not places in the list of the launch.
    """
    entries = _entries(own or "")
    twice = next((entry for at, entry in enumerate(entries) if entry in entries[:at]), None)
    problem = f"it names {twice[:80]} twice, for which CUDA shows no GPU at all" if twice else ""
    if own is None or own == outer:
        # The driver that read it has shown the GPUs; it shows none where one is named twice.
        return VisibleGpus(tuple(gpus), "" if gpus else problem)
    if problem:
        return VisibleGpus((), problem)
    if len({bool(_UUID.match(entry)) for entry in entries}) > 1:
        return VisibleGpus((), "it mixes numbers and UUIDs")
    # In the order of the list: cuda:0 of the process is its first entry.
    found: list[Gpu] = []
    for entry in entries:
        by_uuid = _UUID.match(entry)
        gpu = _by_uuid(gpus, entry) if by_uuid else _by_number(gpus, _entries(outer or ""), entry)
        if isinstance(gpu, str):
            return VisibleGpus((), gpu)
        if gpu in found:
            return VisibleGpus((), f"it names {entry} twice, under two names")
        found.append(gpu)
    return VisibleGpus(tuple(found[:1] if any(gpu.is_slice for gpu in found) else found))


def _entries(value: str) -> list[str]:
    """Return the entries up to one that ends the list: -1, or nothing."""
    entries = [entry.strip() for entry in value.split(",")]
    ends = (place for place, entry in enumerate(entries) if _END_OF_LIST.fullmatch(entry))
    return entries[: next(ends, None)]


def _by_number(gpus: Sequence[Gpu], outer: Sequence[str], entry: str) -> Gpu | str:
    """Return the GPU, or why there is none."""
    if not (entry.isascii() and entry.isdecimal()):
        return f"{entry[:80]!a} is neither the number nor the UUID of a GPU"
    if any(_UUID.match(name) for name in outer):
        return f"{entry} is not known, as the launch's own {VISIBLE_DEVICES} has UUIDs"
    numbers = [int(name) for name in outer if name.isascii() and name.isdecimal()]
    # Where a machine is assumed, the variable of this shell says nothing of its GPUs.
    if len(numbers) != len(gpus):
        numbers = list(range(len(gpus)))
    there = ", ".join(map(str, numbers)) or "none"
    missing = f"there is no GPU {int(entry)} for this launch, which sees {there}"
    return dict(zip(numbers, gpus, strict=True)).get(int(entry), missing)


def _by_uuid(gpus: Sequence[Gpu], entry: str) -> Gpu | str:
    """Return the GPU whose UUID begins like this, or why there is none."""
    found = [gpu for gpu in gpus if (gpu.uuid or "").lower().startswith(entry.lower())]
    if len(found) == 1:
        return found[0]
    # A process sees one MIG device: those of other processes are never among the launch's own.
    is_elsewhere = entry.upper().startswith("MIG-") or any(gpu.uuid is None for gpu in gpus)
    if is_elsewhere and not found:
        return Gpu(-1, f"MIG {entry}" if entry.upper().startswith("MIG-") else entry)
    return f"there is no GPU {entry} for this launch, or several have such a UUID"
