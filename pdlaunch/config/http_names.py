"""Reads host names and URLs as settings list them, and says how a listening server is
reached.

Lists are YAML lists, or texts with commas in flags and variables.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from pdlaunch.config.field_types import read_list

ANY = "*"  # Admits everything, as an entry of ``allowed_hosts``
# Hosts that mean every address of a machine, and the loopback address that reaches each
WILDCARDS: Mapping[str, str] = MappingProxyType(
    {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def local_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """Return the URL at which this machine's processes reach a server that listens on ``host``."""
    return url_of("https" if is_tls else "http", WILDCARDS.get(host, host), port)


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the URL of a server, whose address may be one of IPv6."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether this is an address, or the name, of the loopback device."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _check_host(name: str) -> str:
    if name == ANY or _HOST_NAME.fullmatch(name):
        return name
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError(
            f"{name[:100]!r} is no host name or address; write it without scheme and port, or "
            f"{ANY!r} for any"
        ) from None
    return name


HostNames = Annotated[
    tuple[Annotated[str, AfterValidator(_check_host)], ...],
    BeforeValidator(read_list),
]
