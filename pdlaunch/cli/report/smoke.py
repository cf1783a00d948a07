"""Writes the report of ``pdlaunch smoke --report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdlaunch.bench.serve.progress import duration
from pdlaunch.cli.report.page import Html, cards, environment, facts, page, section, table, text
from pdlaunch.launch.client.smoke import Check

_BAR_PIXELS = 160


def smoke_page(checks: Sequence[Check], deployment: Mapping[str, object]) -> Html:
    """Return the page: each check, its result, how long it took; ``deployment``: what was
    checked.
    """
    num_failed = sum(check.failure is not None for check in checks)
    seconds = sum(check.seconds for check in checks)
    verdict = (
        Html(f'<span class="verdict bad">{num_failed} of {len(checks)} checks failed</span>')
        if num_failed
        else Html(f'<span class="verdict good">{len(checks)} checks passed</span>')
    )
    figures = {
        "checks": str(len(checks)),
        "failed": str(num_failed),
        "in all": duration(seconds),
        "until it was ready": duration(checks[0].seconds) if checks else "-",
    }
    longest = max((check.seconds for check in checks), default=0.0) or 1.0
    rows = [
        [_mark(check), _name(check), _bar(check.seconds / longest), text(f"{check.seconds:.3f}")]
        for check in checks
    ]
    sections = [
        cards(figures),
        section("Checks", table(["", "check", "", "took, s"], rows, words=[0, 1, 2])),
        section("What was checked", facts(dict(deployment) | environment())),
    ]
    return page("pdlaunch smoke", verdict, sections)


def _mark(check: Check) -> Html:
    if check.failure is None:
        return Html('<span class="verdict good">\u2713 ok</span>')
    return Html('<span class="verdict bad">\u2717 failed</span>')


def _name(check: Check) -> Html:
    reason = "" if check.failure is None else f'<div class="reason">{text(check.failure)}</div>'
    return Html(f"{text(check.name)}{reason}")


def _bar(share: float) -> Html:
    width = max(1.0, share * _BAR_PIXELS)
    return Html(
        f'<svg viewBox="0 0 {_BAR_PIXELS} 8" width="{_BAR_PIXELS}" height="8" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="8" rx="2" fill="var(--c0)"/></svg>'
    )
