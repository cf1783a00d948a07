"""Writes rates, sizes and durations short, and names so that no terminal acts upon them."""

from __future__ import annotations

from collections.abc import Sequence

from pdlaunch.protocol.status import Percentiles

UNKNOWN = "-"
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#%"


def amount(value: float | None, unit: str = "") -> str:
    """Write three digits: 0.95, 12.3, 4.33k, 1.99G."""
    if value is None:
        return UNKNOWN
    for limit, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{_digits(value / scale)}{letter}{unit}"
    return f"{_digits(value)}{unit}"


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Write a share of 1: 42%."""
    return UNKNOWN if share is None else f"{share:.0%}"


def milliseconds(value: float | None) -> str:
    """Write 0.95 ms, 123 ms, 12.3 s."""
    if value is None:
        return UNKNOWN
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{_digits(value)} ms"


def times(found: Percentiles | None) -> str:
    """Write the median and the slowest of twenty."""
    if found is None:
        return UNKNOWN
    return f"{milliseconds(found.p50)} (p95 {milliseconds(found.p95)})"


def duration(seconds: float) -> str:
    """Write 42 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def sparkline(points: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Draw the last ``width`` points, the highest as a whole block."""
    bars = _PLAIN_BARS if ascii_only else _BARS
    shown = points[-width:]
    top = max(shown, default=0.0)
    if top <= 0:
        return bars[0] * len(shown)
    return "".join(bars[min(len(bars) - 1, int(point / top * len(bars)))] for point in shown)


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """Draw a share of 1 as a bar."""
    full = round(max(0.0, min(1.0, share)) * width)
    return ("#" if ascii_only else "█") * full + ("." if ascii_only else "░") * (width - full)
