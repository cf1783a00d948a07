"""Draws plots as inline SVG; colours are those of the page, so that both of its themes work."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from pdlaunch.cli.report.page import Html, joined, text

_WIDTH, _HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 40
NUM_COLOURS = 8
_MAX_POINTS = 200
_MAX_BARS = 300

Scale = Literal["linear", "log"]
Point = tuple[float, float]


class Series(NamedTuple):
    """Holds a line of a plot, by its name."""

    name: str
    points: Sequence[Point]
    dashed: bool = False
    colour: int | None = None
    """None: the place among the series."""


class _Axis(NamedTuple):
    low: float
    high: float
    scale: Scale
    start: float
    end: float
    """Its first and last pixel."""

    def place(self, value: float) -> float:
        """Return where a value lies."""
        if self.scale == "log":
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(value)
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values along the axis."""
        if self.scale == "log":
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            found = [
                number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)
            ]
        return [value for value in found if self.low * 0.9999 <= value <= self.high * 1.0001]


def figure(title: str, caption: str, drawing: Html, legend: Html, *, wide: bool = False) -> Html:
    """Return a plot with its title, in words what it shows, and the names of its lines."""
    of_width = ' class="wide"' if wide else ""
    return Html(
        f"<figure{of_width}><h3>{text(title)}</h3><figcaption>{text(caption)}</figcaption>"
        f"{drawing}{legend}</figure>"
    )


def legend(series: Sequence[Series]) -> Html:
    """Return the names of the lines beside their colours."""
    items = (
        Html(
            f'<li><i style="background: {_colour(line, number)}'
            f'{"; opacity: .55" if line.dashed else ""}"></i>{text(line.name)}</li>'
        )
        for number, line in enumerate(series)
    )
    return Html(f'<ul class="legend">{joined(items)}</ul>')


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    markers: bool = True,
    y_high: float | None = None,
    show: Callable[[float], str] = lambda value: f"{value:g}",
) -> Html:
    """Draw lines; ``show`` writes the values of both axes."""
    points = [point for line in series for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = _x_axis(xs, x_scale)
    high = y_high or max(ys, default=0.0) * 1.08 or 1.0
    y_axis = _Axis(0.0, high, "linear", _HEIGHT - _BOTTOM, _TOP)
    drawn = [_grid(x_axis, y_axis, x_label, y_label, show)]
    for number, line in enumerate(series):
        colour = _colour(line, number)
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4" opacity=".6"' if line.dashed else ""
        drawn.append(
            Html(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                f'stroke-linejoin="round"{dash}/>'
            )
        )
        if markers:
            drawn += [
                Html(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                    f"<title>{text(line.name)}: {text(show(at))}, {text(show(value))}</title>"
                    "</circle>"
                )
                for (x, y), (at, value) in zip(places, line.points, strict=True)
            ]
    return _svg(joined(drawn), f"{y_label} over {x_label}")


def distribution(series: Sequence[Series], *, x_label: str) -> Html:
    """Draw how many of the values are at most so large; ``points`` come from ``shares``."""
    return lines(
        series,
        x_label=x_label,
        y_label="share of them",
        x_scale="log",
        markers=False,
        y_high=1.0,
        show=lambda value: f"{value:g}",
    )


def shares(values: Sequence[float]) -> list[Point]:
    """Return values and which share is at most as large: no more points than can be seen."""
    ordered = sorted(value for value in values if value > 0)
    if not ordered:
        return []
    picked = sorted({round(n * (len(ordered) - 1) / (_MAX_POINTS - 1)) for n in range(_MAX_POINTS)})
    points = [
        (ordered[place], bisect_right(ordered, ordered[place]) / len(ordered)) for place in picked
    ]
    return [(ordered[0], 0.0), *points]


class Bar(NamedTuple):
    """Places one request on a timeline, in seconds since its start."""

    begin_s: float
    first_token_s: float | None
    """None: it failed."""
    end_s: float


def timeline(bars: Sequence[Bar]) -> Html:
    """Draw requests below each other: the wait for the first token, then the other tokens."""
    shown = sorted(bars, key=lambda bar: bar.begin_s)[:_MAX_BARS]
    step = max(2.0, min(10.0, 260 / max(len(shown), 1)))
    height = round(_TOP + step * len(shown) + _BOTTOM)
    axis = _Axis(
        0.0, max((bar.end_s for bar in shown), default=1.0) or 1.0, "linear", _LEFT, 2 * _WIDTH
    )
    drawn = [
        Html(
            f'<line x1="{axis.place(at):.1f}" x2="{axis.place(at):.1f}" y1="{_TOP}" '
            f'y2="{height - _BOTTOM}" stroke="var(--grid)"/>'
            f'<text x="{axis.place(at):.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">'
            f"{at:g}</text>"
        )
        for at in axis.ticks()
    ]
    for number, bar in enumerate(shown):
        drawn += _bar(bar, _TOP + number * step, max(1.0, step - 1.5), axis)
    drawn.append(_label(_LEFT + (2 * _WIDTH - _LEFT) / 2, height - 6, "seconds"))
    return _svg(joined(drawn), "requests over time", 2 * _WIDTH + _RIGHT, height)


def _bar(bar: Bar, y: float, height: float, axis: _Axis) -> Iterator[Html]:
    first_s = bar.end_s if bar.first_token_s is None else bar.first_token_s
    said = (
        "failed"
        if bar.first_token_s is None
        else f"first token after {first_s - bar.begin_s:.3f} s"
    )
    title = f"sent at {bar.begin_s:.3f} s, {said}, took {bar.end_s - bar.begin_s:.3f} s"
    parts = [
        (bar.begin_s, first_s, "var(--bad)" if bar.first_token_s is None else "var(--first)"),
        (first_s, bar.end_s, "var(--c0)"),
    ]
    for begin_s, end_s, colour in parts:
        x, end = axis.place(begin_s), axis.place(end_s)
        if end > x:
            yield Html(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(end - x, 0.8):.1f}" '
                f'height="{height:.1f}" fill="{colour}"><title>{text(title)}</title></rect>'
            )


def _x_axis(xs: Sequence[float], scale: Scale) -> _Axis:
    """Return an axis from the smallest to the largest value, or around a single one."""
    low, high = min(xs, default=1.0), max(xs, default=2.0)
    if scale == "log":
        low, high = round_step(low * 0.999, down=True), round_step(high)
    else:
        low, high = min(0.0, low), high * 1.04 or 1.0
    return _Axis(low, high, scale, _LEFT, _WIDTH - _RIGHT)


def _grid(
    x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, show: Callable[[float], str]
) -> Html:
    drawn = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        drawn.append(
            Html(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="var(--grid)"/>'
                f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{text(show(value))}</text>"
            )
        )
    for value in x_axis.ticks():
        x = x_axis.place(value)
        drawn.append(
            Html(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
                f'stroke="var(--grid)"/>'
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
                f"{text(show(value))}</text>"
            )
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    drawn.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label))
    drawn.append(
        Html(
            f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
            f"{text(y_label)}</text>"
        )
    )
    return joined(drawn)


def _label(x: float, y: float, words: str) -> Html:
    return Html(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text(words)}</text>')


def _svg(content: Html, words: str, width: float = _WIDTH, height: float = _HEIGHT) -> Html:
    return Html(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(words)}">'
        f"{content}</svg>"
    )


def _colour(line: Series, number: int) -> str:
    return f"var(--c{(number if line.colour is None else line.colour) % NUM_COLOURS})"


def round_step(step: float, *, down: bool = False) -> float:
    """Return 1, 2 or 5 times a power of ten, not less than ``step``, or not more."""
    power = 10.0 ** math.floor(math.log10(step))
    if down:
        return max(factor * power for factor in (1, 2, 5) if factor * power <= step * 1.0001)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.9999)
