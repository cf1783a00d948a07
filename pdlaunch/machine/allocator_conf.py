"""Finds expandable segments in torch's allocator settings; torch itself refuses what is wrong.

torch 2.11 to 2.13 takes its keys from the first of three variables that is set, be it empty; a
comment in torch's header states the opposite order. White space does not count, and the last of
repeated keys wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables in the order in which torch prefers them."""
_MEANT_AS_TRUE = ("true", "1", "yes", "on")


def expandable_segments_variable(environ: Mapping[str, str]) -> str | None:
    """Return the variable by which a process with this environment gets expandable segments, or is
    meant to (``true`` and ``1``, which torch refuses); None: it gets none.
    """
    name = next((name for name in VARIABLES if name in environ), None)
    text = "" if name is None else re.sub(r"\s", "", environ[name])
    values = re.findall(r"(?:^|,)expandable_segments:([^,:\[\]]*)", text)
    return name if values and values[-1].lower() in _MEANT_AS_TRUE else None
