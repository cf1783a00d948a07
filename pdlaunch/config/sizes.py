"""Reads and writes numbers of bytes with units, such as ``4GiB``."""

import re
from fractions import Fraction

_BINARY = {
    letter + suffix: 1024**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix in ("ib", "i")
}
_DECIMAL = {letter + "b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS = {"": 1, "b": 1} | _BINARY | _DECIMAL
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Return the bytes of ``4GiB`` (powers of 1024), ``4GB`` (powers of 1000) or a plain number, in
    any case. ``4G`` is refused: its meaning differs between tools. Raises ValueError.
    """
    if isinstance(value, bool):
        raise ValueError("a size such as 4GiB is needed, not a boolean")
    if isinstance(value, int):
        return value
    match = _SIZE.fullmatch(str(value))
    unit = "" if match is None else match[2].lower()
    if match is not None and unit in ("k", "m", "g", "t"):
        letter = "k" if unit == "k" else unit.upper()
        binary, decimal = f"{match[1]}{unit.upper()}iB", f"{match[1]}{letter}B"
        forms = f"{binary} (powers of 1024) or {decimal} (powers of 1000)"
        raise ValueError(f"{value!r:.100} may mean {forms}; write one of them")
    if match is None or unit not in _UNITS:
        raise ValueError(f"{value!r:.100} is not a size; write for example 512MiB or 4GiB")
    # Fractions are exact, floats are not.
    return int(Fraction(match[1]) * _UNITS[unit])


def format_size(num_bytes: int) -> str:
    """Return a size with its unit and at most three digits: ``1 GiB``, ``1.5 GiB``, ``300 B``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
