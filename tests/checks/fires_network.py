"""For each rule on addresses and ports (PD409, PD418, PD42x): what fires it, and its fixes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlaunch.launch.client.deployment import held_port
from tests.capabilities import without_capabilities
from tests.checks.firing import Case, Setup
from tests.checks.machines import MOONCAKE, ON_MOONCAKE, limits


@contextlib.contextmanager
def busy_port() -> Iterator[tuple[str, ...]]:
    """Somebody listens on the router's port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "--port", str(server.getsockname()[1])


@contextlib.contextmanager
def free_port() -> Iterator[tuple[str, ...]]:
    with held_port() as port:
        yield "--port", str(port)


@contextlib.contextmanager
def privileged_port() -> Iterator[tuple[str, ...]]:
    """The command has no privileges, and is to listen on a port that needs them."""
    first_free = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if not first_free:
        pytest.skip("this kernel lets everybody listen on every port")
    with without_capabilities():
        yield "--port", str(first_free - 1)


CASES = [
    Case(
        "PD409",
        Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
        {"Use connector nixl": Setup(machine=MOONCAKE)},
    ),
    Case(
        "PD418",
        Setup(flags=ON_MOONCAKE, machine=limits(MOONCAKE, can_bind_to_device=False)),
        {
            "CAP_NET_RAW": Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
            "use connector nixl": Setup(machine=limits(MOONCAKE, can_bind_to_device=False)),
        },
    ),
    Case(
        "PD420",
        Setup(machine=None, arrange=busy_port),
        {
            "Choose another port": Setup(machine=None, arrange=free_port),
            "stop that process": Setup(machine=None, arrange=free_port),
        },
    ),
    Case(
        "PD421",
        Setup(machine=None, arrange=privileged_port),
        {"Choose a port from 1024 on": Setup(machine=None, arrange=free_port)},
    ),
    Case(
        "PD422",
        Setup(flags=("--host", "192.0.2.1"), environ={"PDLAUNCH_API_KEY": "k"}, machine=None),
        {
            "Use 127.0.0.1": Setup(flags=("--host", "127.0.0.1"), machine=None),
            "0.0.0.0": Setup(flags=("--host", "0.0.0.0"), machine=None),
        },
    ),
    Case(
        "PD425",
        Setup(flags=("--decode-tp", "2")),
        {"Use one rank an engine": Setup(flags=("--decode-tp", "1"))},
    ),
]
