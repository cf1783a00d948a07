"""Reads UCX_TLS as UCX does: names, groups of names, and lists of what to leave out.

Source: the help text in libucp of UCX 1.19, as NIXL 1.5.1 ships it. Names are told apart by case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

SHARED_MEMORY = frozenset({"posix", "sysv", "xpmem", "cma", "knem"})
CUDA = frozenset({"cuda_copy", "cuda_ipc", "gdr_copy"})
RDMA = frozenset({"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5", "srd"})
TCP = frozenset({"tcp"})
ALL = SHARED_MEMORY | CUDA | RDMA | TCP | {"self"}

_GROUPS: Mapping[str, frozenset[str]] = {
    "all": ALL,
    **dict.fromkeys(("sm", "shm"), SHARED_MEMORY),
    "mm": frozenset({"posix", "sysv", "xpmem"}),
    "ib": RDMA,
    "rc": frozenset({"rc_verbs", "rc_mlx5"}),
    "rc_v": frozenset({"rc_verbs"}),
    "rc_x": frozenset({"rc_mlx5"}),
    "ud": frozenset({"ud_verbs", "ud_mlx5"}),
    "ud_v": frozenset({"ud_verbs"}),
    "ud_x": frozenset({"ud_mlx5"}),
    **dict.fromkeys(("dc", "dc_x"), frozenset({"dc_mlx5"})),
    "cuda": CUDA,
}
_LOCAL = ("posix", "cma", "self")
_LOCAL_CUDA = ("cuda_ipc", "cuda_copy")


def local_transports(environ: Mapping[str, str], device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that open no door, for a rank whose peers are on its host.

    Network transports listen without authentication; ``sysv`` segments admit the user's whole group
    (mode 0660), ``knem`` regions everybody. ``posix`` segments are unlinked and have mode 0600, CMA
    and CUDA IPC ask for the same user.
    """
    allowed = ucx_transports(environ)
    wanted = (*_LOCAL_CUDA, *_LOCAL) if device == "cuda" else _LOCAL
    return tuple(name for name in wanted if name in allowed)


def network_transports(environ: Mapping[str, str], *, has_rdma: bool) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that join hosts: TCP, and RDMA where there is a device."""
    allowed = ucx_transports(environ)
    wanted = (*sorted(_GROUPS["rc"]), *TCP) if has_rdma else TCP
    return tuple(name for name in wanted if name in allowed)


def opens_network(environ: Mapping[str, str]) -> bool:
    """Return whether a process with this UCX_TLS is to use a network; unset, it names none."""
    return "UCX_TLS" in environ and bool(ucx_transports(environ) & (TCP | RDMA))


def ucx_transports(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the transports that UCX may use: all when UCX_TLS is unset. Unknown names are kept."""
    value = environ.get("UCX_TLS", "all").strip() or "all"
    listed: frozenset[str] = frozenset()
    for name in map(str.strip, value.removeprefix("^").split(",")):
        # A backslash makes it the name of a transport, even where a group has the same name.
        listed |= {name[1:]} if name.startswith("\\") else _GROUPS.get(name, {name} - {""})
    return ALL - listed if value.startswith("^") else listed
