"""Asks the kernel which device a listening socket is bound to."""

from __future__ import annotations

import os
import socket

from pdlaunch.machine.network import Listener


def bound_device(listener: Listener) -> str:
    """Return the name of the device that a socket is bound to; empty: any."""
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        return (
            listening.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
            .rstrip(b"\0")
            .decode()
        )
