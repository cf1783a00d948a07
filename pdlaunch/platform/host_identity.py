"""Which host this process runs on, in the sense that matters to Unix sockets: the kernel and its
network namespace.
"""

from __future__ import annotations

from pathlib import Path


def host_identity(proc: Path = Path("/proc")) -> str:
    """Equal in two processes that reach each other's abstract Unix sockets; empty where the kernel
    does not tell.
    """
    try:
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{(proc / 'self/ns/net').stat().st_ino}"
    except OSError:
        return ""
