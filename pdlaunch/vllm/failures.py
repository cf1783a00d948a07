"""Tells whoever watches this engine of which prefill engine a READ has failed; vLLM counts READs of
all of them together.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FAILURES_FILE = "PDLAUNCH_FAILURES_FILE"
"""Names the file; nobody is told without it."""


def report_failure(engine_id: str) -> None:
    """Add a line with the id of a prefill engine. Never raises."""
    if name := os.environ.get(FAILURES_FILE):
        # One short write in append mode: the ranks of an engine write whole lines.
        with contextlib.suppress(OSError), Path(name).open("a") as file:
            file.write(f"{engine_id}\n")
