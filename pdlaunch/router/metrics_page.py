"""Merges pages of metrics, as text: engines have hundreds of samples each.

prometheus_client's parser takes 20 times as long for a page, in which no answer is streamed.
"""

from __future__ import annotations

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL},?)*)\}})?[ \t]+(\S+(?:[ \t]+-?\d+)?)[ \t]*")
_HEADER = re.compile(rf"# (HELP|TYPE) ({_NAME})(?: (.*))?")
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_info")
"""Endings of the samples of one family."""
_ENGINE = re.compile(r'(^|,)engine="(?:[^"\\]|\\.)*"')


class _Family:
    """Holds the lines of one family."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text
        self.samples: list[str] = []


class MetricFamilies:
    """Families by name; what several pages say of one becomes one family."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, page: str, *, engine: str | None = None) -> None:
        """Add a page in Prometheus's text format, its samples labelled with ``engine``.

        Without an engine of its own no sample can be mistaken for another page's. Series that tell
        when others were created are left out. Raises ValueError for a malformed page, of which
        nothing is added.
        """
        for name, family in _read(page, engine).items():
            known = self._families.setdefault(name, _Family(family.kind, family.text))
            # A family has one type on a page; samples of another type are left out.
            if known.kind == family.kind:
                known.samples += family.samples

    def page(self) -> str:
        """Return all families as one page."""
        lines = []
        for name, family in self._families.items():
            lines += [f"# HELP {name} {family.text}", f"# TYPE {name} {family.kind}"]
            lines += family.samples
        return "\n".join(lines) + "\n"


def _read(page: str, engine: str | None) -> dict[str, _Family]:
    """Return the families of a page by name."""
    texts: dict[str, str] = {}
    families: dict[str, _Family] = {}
    current = ""
    for line in page.splitlines():
        if line.startswith("#"):
            if header := _HEADER.fullmatch(line):
                word, current, rest = header.group(1), header.group(2), header.group(3) or ""
                if word == "HELP":
                    texts[current] = rest
                elif not current.endswith("_created"):
                    families.setdefault(current, _Family(rest, texts.get(current, "")))
            continue
        if not line.strip():
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            raise ValueError(f"not a sample: {line!r:.100}")
        name, labels, value = sample.group(1), sample.group(2) or "", sample.group(3)
        float(value.split()[0])
        if name.endswith("_created"):
            continue
        belongs = name.startswith(current) and name[len(current) :] in _SUFFIXES
        family_name = current if belongs else name
        if (family := families.get(family_name)) is None:
            family = families[family_name] = _Family("untyped", texts.get(family_name, ""))
        shown = labels if engine is None else _labelled(labels, engine)
        family.samples.append(f"{name}{{{shown}}} {value}" if shown else f"{name} {value}")
    return families


def _labelled(labels: str, engine: str) -> str:
    """Return labels with that of the engine, in place of one that is there."""
    escaped = engine.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    label = f'engine="{escaped}"'
    shown, num_found = _ENGINE.subn(lambda found: found.group(1) + label, labels)
    return shown if num_found else f"{label},{labels}".rstrip(",")
