"""Host names in settings, and URLs of servers that listen on a host and port."""

import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from pdlaunch.config.field_types import read_list

ANY = "*"  # An entry of ``allowed_hosts`` that allows every host name
# Hosts that mean all addresses of a machine -> the loopback address that reaches such a server
WILDCARDS: Mapping[str, str] = MappingProxyType(
    {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def local_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """Return the URL for processes of this machine of a server that listens on ``host``."""
    return url_of("https" if is_tls else "http", WILDCARDS.get(host, host), port)


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the URL of a server, with IPv6 addresses in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return True for an address of the loopback device and for ``localhost``."""
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
        fix = f"write it without scheme and port, or {ANY!r} for any name"
        raise ValueError(f"{name[:100]!r} is not a host name or address; {fix}") from None
    return name


# A list in YAML; a text with commas in flags and variables
HostNames = Annotated[
    tuple[Annotated[str, AfterValidator(_check_host)], ...],
    BeforeValidator(read_list),
]
