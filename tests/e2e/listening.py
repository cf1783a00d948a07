"""Finds the listening ports of a launch, and those without authentication."""

import contextlib
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.e2e.client import Deployment
from tests.e2e.waiting import await_true

TIMEOUT_S = 60.0
ZMQ_GREETING = b"\xff" + bytes(8) + b"\x7f\x03"
"""Signature and major version. The other side answers with its mechanism. Source: ZMTP 3.0,
23/ZMTP.
"""


def await_unlocked_ports(deployment: Deployment, expected: dict[str, int]) -> None:
    """Wait until only these ports are unlocked. A port that answers slowly looks unlocked."""
    found: list[dict[str, int]] = []

    def are_as_expected() -> bool:
        found.append(unlocked_ports(deployment))
        return found[-1] == expected

    await_true(are_as_expected, lambda: f"{found[-1]} is {expected}", 60.0)


def all_processes(deployment: Deployment) -> dict[str, psutil.Process]:
    supervisor = psutil.Process(deployment.process.pid)
    return {"supervisor": supervisor, **deployment.processes()}


def tcp_listeners(deployment: Deployment) -> dict[int, tuple[str, str]]:
    """Port -> process and address of all TCP sockets of the launch that listen."""
    return {
        each.laddr.port: (name, each.laddr.ip)
        for name, process in all_processes(deployment).items()
        for each in process.net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    }


def unlocked_ports(deployment: Deployment) -> dict[str, int]:
    """Process -> number of its TCP ports with neither HTTP (which has its own tests) nor ZMQ with
    CURVE.
    """
    ports = tcp_listeners(deployment)
    with ThreadPoolExecutor(len(ports)) as pool:
        is_locked = pool.map(lambda port: speaks_http(port) or speaks_curve(port), ports)
    names = [name for name, _ in ports.values()]
    return dict(Counter(name for name, locked in zip(names, is_locked, strict=True) if not locked))


def speaks_http(port: int) -> bool:
    return exchange(
        port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    ).startswith(b"HTTP/1.1 ")


def speaks_curve(port: int) -> bool:
    """True if the greeting of a socket says that it accepts only CURVE."""
    return exchange(port, ZMQ_GREETING)[12:32].rstrip(b"\0") == b"CURVE"


def exchange(port: int, message: bytes, address: str = "127.0.0.1") -> bytes:
    """The first bytes of the answer; empty if none comes for a while, as from a port that waits
    for more input.
    """
    answer = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address, port), timeout=TIMEOUT_S) as stranger,
    ):
        stranger.sendall(message)
        stranger.settimeout(2 if address == "127.0.0.1" else 4)
        while len(answer) < 64 and (chunk := stranger.recv(64 - len(answer))):
            answer += chunk
    return answer
