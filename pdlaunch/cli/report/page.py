"""Puts a report together: one HTML file with its own style, without scripts or other files.

Whatever comes from outside (names of models, errors) goes through ``text``; pieces of HTML are of
the type ``Html``, so that none is escaped twice or not at all.
"""

from __future__ import annotations

import contextlib
import html
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NewType

from pdlaunch import __version__
from pdlaunch.cli.output import print_errors

Html = NewType("Html", str)

_LIBRARIES = ("torch", "transformers", "nixl", "vllm")
_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1a2230; --soft: #5d6778;
  --line: #dfe3ea; --grid: #e9ecf1; --good: #1a7f4b; --bad: #c22f3d; --first: #b8c4d6;
  --c0: #2563c9; --c1: #d9730d; --c2: #15876f; --c3: #9b3fb5; --c4: #b8860b; --c5: #c22f5c;
  --c6: #4a6b8a; --c7: #5e8f1f; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161d; --card: #1b212b; --ink: #e6eaf1;
  --soft: #98a3b5; --line: #2e3643; --grid: #262d39; --good: #4cc38a; --bad: #f2707b;
  --first: #46546a; --c0: #6ea8fe; --c1: #f2a65a; --c2: #4fc3a9; --c3: #cf8be0; --c4: #e0b94c;
  --c5: #f2789f; --c6: #8fb0cf; --c7: #9ccc5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0; }
.lead, figcaption, .note { color: var(--soft); }
.lead { margin: 0 0 22px; }
figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 0; padding: 16px 18px; }
figcaption { font-size: 13px; margin: 2px 0 10px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.plots { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); }
.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 8px 0 0;
  padding: 0; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 13.5px; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }
td.words, th.words { text-align: left; white-space: normal; min-width: 7.5em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-weight: 600; }
.reason { color: var(--bad); font-size: 13px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0;
  font-size: 13.5px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; margin-top: 32px; }
@media print { body { background: #fff; } figure, .card, .scroll { break-inside: avoid; } }
"""


def text(value: object) -> Html:
    """Escape what is not ours."""
    return Html(html.escape(str(value)))


def joined(pieces: Iterable[Html]) -> Html:
    """Return the pieces one after the other."""
    return Html("".join(pieces))


def page(title: str, lead: Html, sections: Iterable[Html]) -> Html:
    """Return the whole file."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return Html(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>{text(title)}</h1><p class="lead">{lead}</p>\n{joined(sections)}\n'
        f"<footer>Made by pdlaunch {text(__version__)} on "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Neither prompts nor answers are in this file."
        f"</footer></main></body></html>\n"
    )


def cards(figures: Mapping[str, str]) -> Html:
    """Return large figures, each with its name."""
    return Html(
        '<div class="cards">'
        + joined(
            Html(f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>')
            for name, value in figures.items()
        )
        + "</div>"
    )


def section(title: str, content: Html) -> Html:
    """Return a part of the page under its heading."""
    return Html(f"<section><h2>{text(title)}</h2>{content}</section>")


def facts(found: Mapping[str, object]) -> Html:
    """Return names and values below each other."""
    pairs = (Html(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>") for name, value in found.items())
    return Html(f'<div class="card"><dl>{joined(pairs)}</dl></div>')


def table(headings: Sequence[str], rows: Iterable[Sequence[Html]], words: Sequence[int]) -> Html:
    """Return a table; the columns numbered ``words`` are not figures."""

    def cell(kind: str, number: int, content: Html) -> Html:
        of_words = ' class="words"' if number in words else ""
        return Html(f"<{kind}{of_words}>{content}</{kind}>")

    head = joined(cell("th", number, text(name)) for number, name in enumerate(headings))
    body = joined(
        Html("<tr>" + joined(cell("td", number, item) for number, item in enumerate(row)) + "</tr>")
        for row in rows
    )
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def environment() -> dict[str, str]:
    """Return the versions that figures depend on."""
    libraries = {}
    for name in _LIBRARIES:
        # One that is not installed has no version.
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return {
        "pdlaunch": __version__,
        "Python": platform.python_version(),
        **libraries,
        "Machine": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }


def write_report(path: Path, option: str, content: Html) -> int:
    """Write the file and its folder; return the exit code, 1 when that failed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        print_errors([f"{option} {path} cannot be written: {error.strerror or error}"])
        return 1
    return 0
