"""``python -m tests.netns.stranger ADDRESS PORT..`` tells what each port says to somebody without a
key.
"""

import json
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from tests.e2e.listening import ZMQ_GREETING, exchange

TIMEOUT_S = 20.0
_REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Seen:
    port: int
    kind: str
    """``tls`` (HTTP inside), ``http``, ``curve`` (ZMQ), or ``open``: it asks nobody who he is."""
    status: int = 0
    """The answer to a request without a key."""


def look(address: str, port: int) -> Seen:
    if b"CURVE" in exchange(port, ZMQ_GREETING, address):
        return Seen(port, "curve")
    if (plain := exchange(port, _REQUEST % address.encode(), address)).startswith(b"HTTP/"):
        return Seen(port, "http", int(plain.split()[1]))
    if status := status_over_tls(address, port):
        return Seen(port, "tls", status)
    return Seen(port, "open")


def status_over_tls(address: str, port: int) -> int:
    """The status of a request without a key, whoever holds the certificate; 0: no TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address, port), timeout=TIMEOUT_S) as plain,
            context.wrap_socket(plain) as stranger,
        ):
            stranger.sendall(_REQUEST % address.encode())
            return int(stranger.recv(64).split()[1])
    except (OSError, IndexError, ValueError):
        return 0


if __name__ == "__main__":
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(partial(look, sys.argv[1]), map(int, sys.argv[2:])))
    sys.stdout.write(json.dumps([asdict(each) for each in found]))
