"""Finds UCX's transport for READs in the log of this process or of another process.

NIXL does not report the transport. UCX prints a table when it first chooses transports for a kind
of peer and memory::

    | remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda/dev[1] |
    | 0..inf | software emulation | tcp/lo                                  |
"""

import re
from pathlib import Path

EMULATION = "software emulation"  # UCX does a READ by a message that a thread of the peer answers
_TAIL_BYTES = 1024**2
_STDOUT = Path("/proc/self/fd/1")
# The row for the largest READs
_TABLE = re.compile(r"(?s)memory read by ucp_get.*?\.\.inf\s*\|\s*([^|]*?)\s*\|\s*([^|]*?)\s*\|")
_RDMA = re.compile(r"(rc|dc|ud|srd|gga)(_\w+)?")


class ReadTransports:
    """Reads UCX's tables in the output of this process and its children, if it goes to a file."""

    def __init__(self) -> None:
        self._read_to = self._size()
        self._known = ""

    def latest(self) -> str:
        """Return the last transport: ``cma``, ``tcp, software emulation``; empty if unknown."""
        begin = max(self._read_to, self._size() - _TAIL_BYTES)
        if begin < self._size():
            with _STDOUT.open("rb") as log:
                log.seek(begin)
                text = log.read()
            self._read_to = begin + len(text)
            self._known = _transport_in(text) or self._known
        return self._known

    @staticmethod
    def _size() -> int:
        return _STDOUT.stat().st_size if _STDOUT.is_file() else 0


def transport_of(process: int) -> str:
    """Return the transport in the log of another process; empty if there is none."""
    try:
        output = Path(f"/proc/{process}/fd/1")
        return _transport_in(output.read_bytes()) if output.is_file() else ""
    except OSError:
        return ""


def path_over(path: str, transport: str) -> str:
    """Return the name of a path with its transport, if known: ``nixl/UCX (cma)``."""
    return f"{path} ({transport})" if transport else path


def _transport_in(text: bytes) -> str:
    # Ranks of an engine share a log. Prefer tables with emulation, the slowest transport.
    tables = map(_named, _TABLE.findall(text.decode(errors="replace")))
    return max(tables, key=lambda name: EMULATION in name, default="")


def _named(table: tuple[str, str]) -> str:
    how, config = table
    found = re.findall(r"(?<![\w:/])([a-z]\w*)/", config)
    names = dict.fromkeys("rdma" if _RDMA.fullmatch(name) else name for name in found)
    return ", ".join([" and ".join(names) or config, *([EMULATION] if how == EMULATION else [])])
