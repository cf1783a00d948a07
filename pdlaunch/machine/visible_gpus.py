"""Interprets CUDA_VISIBLE_DEVICES like CUDA, for a process that has not started yet.

The variable of the launch may have UUIDs; that of a role must have numbers. CUDA silently ignores
all entries from the first unusable one on, and shows no GPU if one is listed twice. Here both are
problems.

Source: tried with the driver of CUDA 13 on two H200s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.machine.facts import Gpu

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """Holds the GPUs that a process sees; the first is its ``cuda:0``."""

    gpus: tuple[Gpu, ...]
    problem: str = ""  # the mistake in the variable; empty if there is none


def visible_gpus(gpus: Sequence[Gpu], outer: str | None, own: str | None) -> VisibleGpus:
    """Return the GPUs that a process with the variable ``own`` sees.

    ``gpus``: those that the launch sees with its variable ``outer``. Numbers in ``own`` are numbers
    of the machine's GPUs, not places in ``outer``.
    """
    if own is None or own == outer:
        return VisibleGpus(tuple(gpus))
    wanted = _numbers(own)
    if wanted is None:
        return VisibleGpus((), f"{own[:80]!a} is not a list of GPU numbers, such as 0,1")
    if len(set(wanted)) < len(wanted):
        return VisibleGpus((), "it names a GPU twice; CUDA then shows no GPU at all")
    listed = [] if outer is None else _numbers(outer)
    if listed is None:
        reason = f"as the launch's own {VISIBLE_DEVICES} has UUIDs"
        return VisibleGpus((), f"the numbers of its GPUs are not known, {reason}")
    # If the machine is a profile, the variable of this shell does not describe its GPUs.
    known = listed if len(listed) == len(gpus) else range(len(gpus))
    by_number = dict(zip(known, gpus, strict=True))
    missing = next((number for number in wanted if number not in by_number), None)
    if missing is not None:
        there = ", ".join(map(str, by_number)) or "none"
        return VisibleGpus((), f"there is no GPU {missing} for this launch, which sees {there}")
    # Keep the order of the variable: its first entry is cuda:0 of the process.
    return VisibleGpus(tuple(by_number[number] for number in wanted))


def _numbers(value: str) -> list[int] | None:
    """Return the numbers before the first -1 or empty entry; None if an entry is not a number."""
    numbers: list[int] = []
    for entry in map(str.strip, value.split(",")):
        if entry in ("", "-1"):
            break
        if not (entry.isascii() and entry.isdecimal()):
            return None
        numbers.append(int(entry))
    return numbers
