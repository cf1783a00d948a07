"""Reads UCX_TLS as UCX does: names, groups of names, and lists of what to leave out.

Source: the help text in libucp of UCX 1.19, as NIXL 1.5.1 ships it, and what it does with odd
values: names are told apart by case, and ``*`` is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

SHARED_MEMORY = frozenset({"posix", "sysv", "xpmem", "cma", "knem"})
CUDA = frozenset({"cuda_copy", "cuda_ipc", "gdr_copy"})
RDMA = frozenset({"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5", "srd"})
TCP = frozenset({"tcp"})
ALL = SHARED_MEMORY | CUDA | RDMA | TCP | {"self"}

_OF_OTHER_MACHINES = frozenset(
    {"rocm_copy", "rocm_ipc", "ze_copy", "ze_ipc", "ze_gdr", "ugni_rdma", "ugni_smsg", "ugni_udt"}
    | {"gga_mlx5", "rocm", "ze", "ugni"}
)
"""Names that UCX knows, of transports that pdlaunch has no use for."""

_GROUPS: Mapping[str, frozenset[str]] = {
    "all": ALL,
    "sm": SHARED_MEMORY,
    "shm": SHARED_MEMORY,
    "mm": frozenset({"posix", "sysv", "xpmem"}),
    "ib": RDMA,
    "rc": frozenset({"rc_verbs", "rc_mlx5"}),
    "rc_v": frozenset({"rc_verbs"}),
    "rc_x": frozenset({"rc_mlx5"}),
    "ud": frozenset({"ud_verbs", "ud_mlx5"}),
    "ud_v": frozenset({"ud_verbs"}),
    "ud_x": frozenset({"ud_mlx5"}),
    "dc": frozenset({"dc_mlx5"}),
    "dc_x": frozenset({"dc_mlx5"}),
    "cuda": CUDA,
    "cuda_ipc": frozenset({"cuda_ipc"}),
    "cuda_copy": frozenset({"cuda_copy"}),
}


_AUXILIARY = ":aux"
"""Behind a name: UCX uses that transport to connect others alone."""
_MEMORY_DEVICE = "memory"
"""The only device of the shared memory transports."""
_LOCAL = ("posix", "cma", "self")
_LOCAL_CUDA = ("cuda_ipc", "cuda_copy")


def local_transports(environ: Mapping[str, str], device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that open no door, for a rank whose peers are on its host.

    Network transports listen without authentication; ``sysv`` segments admit the user's whole group
    (mode 0660), ``knem`` regions everybody. ``posix`` segments are unlinked and have mode 0600, CMA
    and CUDA IPC ask for the same user.
    """
    allowed = ucx_transports(environ)
    return tuple(
        name
        for name in ((*_LOCAL_CUDA, *_LOCAL) if device == "cuda" else _LOCAL)
        if name in allowed
    )


def network_transports(environ: Mapping[str, str], *, has_rdma: bool) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that join hosts: TCP, and RDMA where there is a device."""
    allowed = ucx_transports(environ)
    wanted = (*sorted(_GROUPS["rc"]), *sorted(TCP)) if has_rdma else sorted(TCP)
    return tuple(name for name in wanted if name in allowed)


def opens_network(environ: Mapping[str, str]) -> bool:
    """Return whether a process with this UCX_TLS is to use a network; unset, it names none."""
    return "UCX_TLS" in environ and bool(ucx_transports(environ) & (TCP | RDMA))


def ucx_transports(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the transports that UCX may use: all when UCX_TLS is unset. Unknown names are kept."""
    value, names = _names(environ)
    listed = frozenset[str]().union(*map(_transports_of, names))
    return ALL - listed if value.startswith("^") else listed


def unknown_transports(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names in UCX_TLS that no build of UCX knows, in order."""
    known = ALL | _GROUPS.keys() | _OF_OTHER_MACHINES
    return tuple(
        name
        for name in _names(environ)[1]
        if (name.removeprefix("\\").removesuffix(_AUXILIARY) not in known)
        or (name.startswith("\\") and name[1:] not in ALL | _OF_OTHER_MACHINES)
    )


def known_transports() -> frozenset[str]:
    """Return the transports and groups that UCX_TLS may name."""
    return ALL | _GROUPS.keys()


def leaves_out_shared_memory(environ: Mapping[str, str]) -> bool:
    """Return whether UCX_SHM_DEVICES keeps the shared memory transports from being used."""
    value = environ.get("UCX_SHM_DEVICES", "")
    names = value.removeprefix("^").split(",")
    if value.startswith("^"):
        return _MEMORY_DEVICE in names
    return bool(value) and not {_MEMORY_DEVICE, "all"}.intersection(names)


def _names(environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return UCX_TLS and the names in it."""
    value = environ.get("UCX_TLS", "all").strip() or "all"
    names = (name.strip() for name in value.removeprefix("^").split(","))
    return value, [name for name in names if name]


def _transports_of(name: str) -> frozenset[str]:
    """Return the transports that one name stands for."""
    # A backslash makes it the name of a transport, even where a group has the same name.
    if name.startswith("\\"):
        return frozenset({name[1:]})
    return _GROUPS.get(name, frozenset({name}))


def setting(environ: Mapping[str, str]) -> str:
    """Return UCX_TLS as a message shows it."""
    return ascii(environ.get("UCX_TLS", "all"))[:80]
