"""Read the lists that options of ``pdlaunch bench`` take. Others raise typer's BadParameter."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import typer


def read_numbers(text: str, option: str) -> list[int]:
    """Read ``1,4,16``."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise _refused(option, f"{text!r} is not a list of positive numbers such as 1,4,16")
    return numbers


def read_rates(text: str | None, option: str) -> list[float]:
    """Read ``0.5,2,8``. Empty for None."""
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise _refused(option, f"{text!r} is not a list of positive numbers such as 0.5,2,8")
    return numbers


def read_positive(number: float | None, option: str) -> float:
    """Return a number above 0, infinity included; 1 for None."""
    if number is not None and not number > 0:
        raise _refused(option, f"{number:g} is not above 0")
    return 1.0 if number is None else number


def read_decimals(text: str | None, keys: Sequence[int], option: str) -> dict[int, float]:
    """Read ``4.9,6.2``: one number for each key, or one for all. Empty for None."""
    if text is None:
        return {}
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= len(keys)
    if len(numbers) != len(keys) or not all(0 < number < math.inf for number in numbers):
        wanted = ",".join(map(str, keys))
        raise _refused(
            option, f"{text!r} is neither a positive number nor a list of one for each of {wanted}"
        )
    return dict(zip(keys, numbers, strict=True))


def read_names(text: str, known: Collection[str], option: str) -> list[str]:
    """Read ``nixl,file``, each one of ``known``."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise _refused(option, f"{name!r} is none of {', '.join(known)}")
    return names


def read_name(text: str, known: Collection[str], option: str) -> str:
    """Read ``tcp``, one of ``known``."""
    names = read_names(text, known, option)
    if len(names) > 1:
        raise _refused(option, f"{text!r} is not one of {', '.join(known)}")
    return names[0]


def read_pairs(text: str, option: str) -> list[list[int]]:
    """Read ``1x1,1x3``."""
    pairs = [re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", part) for part in text.split(",")]
    found = [[int(pair[1]), int(pair[2])] for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        raise _refused(option, f"{text!r} is not a list of pairs such as 1x1,1x3")
    return found


def _refused(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")
