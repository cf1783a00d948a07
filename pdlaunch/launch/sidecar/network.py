"""Finds, on the host of an engine, what its way to other hosts needs: a port, a device's name."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Mapping

from pdlaunch.config.http_names import is_loopback
from pdlaunch.errors import StartupError
from pdlaunch.machine.network import with_device_names

SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_DEVICES = "UCX_NET_DEVICES"


class SideChannelPort:
    """Keeps a port for the side channel of an engine, which takes no port 0 and would wait for one
    that is busy for ever.

    The engine listens there a minute after it was started. Until then, and after, this socket keeps
    others away: UCX, other engines, whoever asks for any free port. It is bound and does not
    listen, so that the engine can, whose socket has SO_REUSEADDR as this one has.
    """

    def __init__(self, host: str, ports: str) -> None:
        """``ports``: first and last one that it may be, ``21000-21999``; empty, or on the loopback
        device: any. Raises StartupError.
        """
        wanted = [0] if is_loopback(host) or not ports else _shuffled(ports)
        self._socket = _bound(host, wanted, ports)
        self.host = host
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def named_devices(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what UCX needs in the place of this host's address, which is all that the supervisor
    knows of it. Raises StartupError.
    """
    try:
        devices = with_device_names(environ.get(_DEVICES, ""))
    except LookupError as error:
        raise StartupError(str(error)) from None
    return {_DEVICES: devices} if devices else {}


def _shuffled(ports: str) -> list[int]:
    first, _, last = ports.partition("-")
    found = range(int(first), int(last) + 1)
    # Two engines that start at the same time look at other ones first.
    return random.SystemRandom().sample(found, len(found))


def _bound(host: str, ports: Iterable[int], shown: str) -> socket.socket:
    problem = "there is none"
    for port in ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        holder = socket.socket(family)
        try:
            # Without SO_REUSEADDR, which would share the port of another holder.
            holder.bind((host, port))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError as error:
            holder.close()
            problem = error.strerror or str(error)
            continue
        return holder
    raise StartupError(
        f"no port {shown} of {host} can be had for the side channel of vLLM: {problem} "
        "(kv_transfer.data_ports)"
    )
