"""Reads the configuration of torch's allocator from the environment as a CUDA build of torch does.

Compared with torch 2.13.0+cu130 (libc10, libc10_cuda), and with torch 2.11.0 on an H200: the keys
of every device come from the first of PYTORCH_CUDA_ALLOC_CONF, PYTORCH_HIP_ALLOC_CONF and
PYTORCH_ALLOC_CONF that is set, be it empty; CUDA's own from the first of them that is not HIP's.
A comment in torch's header states the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pdlaunch.machine.allocator_conf_parser import ConfRefused, ConfWalk

HIP_VARIABLE = "PYTORCH_HIP_ALLOC_CONF"
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", HIP_VARIABLE, "PYTORCH_ALLOC_CONF")
"""Variables in the order in which torch 2.11 to 2.13 prefers them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Says why torch ends the process with an exception when it first uses a device."""

    variable: str
    reason: str
    at_import: bool
    """A build of torch for CUDA cannot even be imported, whatever the device."""


@dataclass(frozen=True, slots=True)
class AllocatorConf:
    """Holds the configuration as torch takes it."""

    variable: str | None
    """The variable that torch reads; None: none is set."""
    ignored: tuple[str, ...]
    """Set variables of which torch reads nothing, or CUDA's own keys at most."""
    expandable_segments: bool
    """Switched on, or meant to be (``true``, ``1``)."""
    backend: str | None = None
    """The allocator: ``native`` or ``cudaMallocAsync``; None: not set, so native."""
    refusal: Refusal | None = None


def read_allocator_conf(environ: Mapping[str, str]) -> AllocatorConf:
    """Return what a process with this environment gets."""
    variables = [name for name in VARIABLES if name in environ]
    if not variables:
        return AllocatorConf(None, (), False)
    first = variables[0]
    walk = ConfWalk(environ[first])
    reason, refused = _refused(walk.of_all_devices), first
    at_import, backend = False, None
    for_cuda = next((name for name in variables if name != HIP_VARIABLE), None)
    if for_cuda is not None:
        cuda_walk = ConfWalk(environ[for_cuda])
        at_import = _refused(cuda_walk.at_import) is not None
        backend = cuda_walk.backend
        if reason is None:
            reason, refused = _refused(cuda_walk.of_cuda), for_cuda
    return AllocatorConf(
        first,
        tuple(variables[1:]),
        walk.expandable_segments,
        backend,
        None if reason is None else Refusal(refused, reason, at_import),
    )


def _refused(walk: Callable[[], None]) -> str | None:
    try:
        walk()
    except ConfRefused as error:
        return str(error)
    return None
