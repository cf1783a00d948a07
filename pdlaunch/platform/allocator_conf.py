"""Reads `expandable_segments` from the environment as torch's allocator does.

Checked against torch 2.13.0 (libc10, ``AcceleratorAllocatorConfig``) and 2.11.0 on an H200: the
first of PYTORCH_CUDA_ALLOC_CONF, PYTORCH_HIP_ALLOC_CONF and PYTORCH_ALLOC_CONF that is set, be it
empty, is read alone. A comment in its header states the opposite order. White space does not count,
the last of repeated keys wins, and only ``True`` and ``False`` are values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables in the order in which torch 2.11 to 2.13 prefers them."""

_TOKEN = re.compile(r"[,:\[\]]|[^,:\[\]]+")
_SPACE = re.compile(r"\s+", re.ASCII)
_MEANT_AS_TRUE = frozenset({"true", "1", "yes", "on"})
_KEY = "expandable_segments"


@dataclass(frozen=True, slots=True)
class ExpandableSegments:
    """Holds the setting as torch takes it."""

    variable: str | None
    """The variable that torch reads; None: none is set."""
    ignored: tuple[str, ...]
    """Set variables that torch does not read."""
    enabled: bool
    """Switched on, or meant to be (``true``, ``1``)."""
    refused: str | None = None
    """A value that torch refuses with an exception when it first allocates."""


def read_expandable_segments(environ: Mapping[str, str]) -> ExpandableSegments:
    """Return what a process with this environment gets."""
    variables = [name for name in VARIABLES if name in environ]
    if not variables:
        return ExpandableSegments(None, (), False)
    values = _values(environ[variables[0]])
    refused = next((value for value in values if value not in ("True", "False")), None)
    enabled = bool(values) and values[-1].lower() in _MEANT_AS_TRUE
    return ExpandableSegments(variables[0], tuple(variables[1:]), enabled, refused)


def _values(conf: str) -> list[str]:
    """Return each value of the key, in order.

    Tokens are walked as torch does: key, separator, value or list, separator.
    """
    tokens = _TOKEN.findall(_SPACE.sub("", conf))
    found = []
    position = 0
    while position + 2 < len(tokens):
        key, position = tokens[position], position + 2
        if tokens[position] == "[":
            while position < len(tokens) and tokens[position] != "]":
                position += 1
        if key == _KEY and position < len(tokens):
            found.append(tokens[position])
        position += 2
    return found
