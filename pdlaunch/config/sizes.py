"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: 1024**power for power, prefix in enumerate("kmgt", start=1) for suffix in ("", "ib", "b")
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Read ``4GiB``, ``512 MiB``, ``1.5g`` or a plain number; every unit is a power of 1024.

    Raises ValueError, which pydantic turns into a finding with the field's name.
    """
    if isinstance(value, bool):
        raise ValueError("a size such as 4GiB is needed, not a boolean")
    if isinstance(value, int):
        return value
    match = _SIZE.fullmatch(str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write for example 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(num_bytes: int) -> str:
    """The shortest exact or three-digit form: ``1 GiB``, ``1.5 GiB``, ``300 B``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
