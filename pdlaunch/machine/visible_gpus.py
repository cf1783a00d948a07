"""Reads CUDA_VISIBLE_DEVICES as CUDA does, for a process that is yet to be started.

A launch may have UUIDs in its own variable, which the driver reads; a role's own has numbers. CUDA
goes through the list until an entry that it cannot use, and forgets the rest; a GPU that is named
twice is an error. What it would drop in silence is a problem here.

Source: tried with the driver of CUDA 13 on two H200s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.machine.facts import Gpu

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """Holds the GPUs that a process sees; its ``cuda:0`` is the first."""

    gpus: tuple[Gpu, ...]
    problem: str = ""  # the fault of the variable; empty when it has none


def visible_gpus(gpus: Sequence[Gpu], outer: str | None, own: str | None) -> VisibleGpus:
    """Return which of the launch's GPUs a process sees whose variable is ``own``.

    ``gpus`` are those that the launch itself sees with ``outer``. As in any process, numbers are
    those of the machine, and not places in the list of the launch.
    """
    if own is None or own == outer:
        return VisibleGpus(tuple(gpus))
    wanted = _numbers(own)
    if wanted is None:
        return VisibleGpus((), f"{own[:80]!a} is no list of numbers of GPUs, such as 0,1")
    if len(set(wanted)) < len(wanted):
        return VisibleGpus((), "it names a GPU twice, for which CUDA shows no GPU at all")
    listed = [] if outer is None else _numbers(outer)
    if listed is None:
        reason = f"as the launch's own {VISIBLE_DEVICES} has UUIDs"
        return VisibleGpus((), f"the numbers of its GPUs are not known, {reason}")
    # Where a machine is assumed, the variable of this shell says nothing of its GPUs.
    known = listed if len(listed) == len(gpus) else range(len(gpus))
    by_number = dict(zip(known, gpus, strict=True))
    missing = next((number for number in wanted if number not in by_number), None)
    if missing is not None:
        there = ", ".join(map(str, by_number)) or "none"
        return VisibleGpus((), f"there is no GPU {missing} for this launch, which sees {there}")
    # In the order of the list: cuda:0 of the process is its first entry.
    return VisibleGpus(tuple(by_number[number] for number in wanted))


def _numbers(value: str) -> list[int] | None:
    """Return the numbers before a -1 or an empty entry; None where one is no number."""
    numbers: list[int] = []
    for entry in map(str.strip, value.split(",")):
        if entry in ("", "-1"):
            break
        if not (entry.isascii() and entry.isdecimal()):
            return None
        numbers.append(int(entry))
    return numbers
