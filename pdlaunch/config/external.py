"""Names engines that somebody else started, and the URLs at which a router may look for some.

A router sends prompts, and keys, to whatever URL it is told of while it runs: ``EngineUrls`` bounds
what those who may command it can make it reach (SSRF).
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from pdlaunch.config.field_types import FrozenModel, read_list
from pdlaunch.config.roles import EngineName, Role

UNIX = "unix:"
DNS = "dns+"
"""Begins a URL that stands for one engine at each address of its name."""
_LABEL = re.compile(r"[a-z0-9_:-]{1,63}", re.IGNORECASE)
"""A label of a DNS name (RFC 1035), or an IPv6 address."""
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ALLOWED = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|(\*\.)?[A-Za-z0-9_][A-Za-z0-9_.-]*)(?P<prefix>/\d{1,3})?"
    r"(:(?P<first>\d{1,5})(-(?P<last>\d{1,5}))?)?/?"
)
_HOW = (
    "write http://HOST:PORT, with a network (10.0.0.0/24), a name (*.svc) and a range of ports "
    "(8000-8100) where needed, or unix:/FOLDER"
)


class EngineAddress(NamedTuple):
    """Holds the parts of an engine's URL; a Unix socket has a path alone."""

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX}{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def read_engine_url(url: str) -> EngineAddress:
    """Return the parts of ``http(s)://HOST:PORT``, ``dns+http://NAME:PORT`` or ``unix:/PATH``.

    Raises ValueError.
    """
    if url.startswith(UNIX):
        path = url.removeprefix(UNIX)
        if not path.startswith("/") or posixpath.normpath(path) != path or "\0" in path:
            raise ValueError(f"{url[:100]!r}: write the whole path of the socket: unix:/run/x.sock")
        return EngineAddress("unix", "", 0, path)
    if "@" in url:
        raise ValueError("a URL holds no user or key here; name the key's variable in api_key_env")
    try:
        parts = urlsplit(url.removeprefix(DNS))
        port = parts.port  # raises when it is none
    except ValueError:
        raise ValueError(f"{url[:100]!r} is no URL") from None
    # A name with its root dot is the same name, and would pass by a list without it.
    host = (parts.hostname or "").rstrip(".")
    # A path or a query would be dropped or sent along: neither is what was meant.
    plain = f"{parts.scheme}://{parts.netloc}"
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not host
        or url.removeprefix(DNS).rstrip("/") != plain
        # DNS has no others, and Python raises another error for them than for a name unknown.
        or not all(map(_LABEL.fullmatch, host.split(".")))
    ):
        raise ValueError(
            f"{url[:100]!r} is no URL of an engine; write http://HOST:PORT, https://HOST:PORT, "
            "dns+http://NAME:PORT or unix:/PATH"
        )
    return EngineAddress(parts.scheme, host.lower(), port or _DEFAULT_PORTS[parts.scheme])


def is_allowed(url: str, allowed: Sequence[str]) -> bool:
    """Tell whether an entry of ``engine_urls`` covers the URL of an engine.

    Addresses are covered by networks and names by names: what a name resolves to is the business
    of whoever allowed the name.
    """
    address = read_engine_url(url)
    return any(_covers(entry, address) for entry in allowed)


def _covers(entry: str, address: EngineAddress) -> bool:
    if entry.startswith(UNIX):
        folder = entry.removeprefix(UNIX).rstrip("/")
        return address.path == folder or address.path.startswith(f"{folder}/")
    scheme, host, network, ports = _read_entry(entry)
    if address.scheme != scheme or address.port not in ports:
        return False
    # A name is never resolved here: between this check and the request it could change.
    if network is None:
        is_below = host.startswith("*.") and address.host.endswith(host[1:])
        return is_below or address.host == host
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        return False
    # The same host in another form must not pass by, nor be kept out.
    ip = (ip.version == 6 and ip.ipv4_mapped) or ip
    return ip.version == network.version and ip in network


def _read_entry(entry: str) -> tuple[str, str, _Network | None, range]:
    """Return scheme, host, the network that it names, and ports. Raises ValueError."""
    found = _ALLOWED.fullmatch(entry)
    if found is None:
        raise ValueError(f"{entry[:100]!r} allows no URL; {_HOW}")
    host, prefix = found["host"].strip("[]").lower(), found["prefix"] or ""
    try:
        network: _Network | None = ipaddress.ip_network(host + prefix, strict=False)
    except ValueError:
        if prefix:
            raise ValueError(f"{entry[:100]!r}: {host}{prefix} is no network; {_HOW}") from None
        network = None
    first = int(found["first"] or _DEFAULT_PORTS[found["scheme"]])
    last = int(found["last"] or first)
    if not first <= last <= 65535:
        raise ValueError(f"{entry[:100]!r}: ports go up to 65535, the lower one first")
    return found["scheme"], host, network, range(first, last + 1)


def _check_allowed(entry: str) -> str:
    if entry.startswith(UNIX):
        read_engine_url(entry.rstrip("/"))
    else:
        _read_entry(entry)
    return entry


def _check_url(url: str) -> str:
    address = read_engine_url(url)
    return f"{DNS if url.startswith(DNS) else ''}{address}"


def _read_engine(value: object) -> object:
    """Read ``prefill=URL``, the form of flags and variables."""
    if isinstance(value, str):
        role, equals, url = value.partition("=")
        if not equals:
            raise ValueError(f"{value[:100]!r}: write prefill=URL, decode=URL or both=URL")
        return {"role": role.strip(), "url": url.strip()}
    return value


class RunningEngine(FrozenModel):
    """Names an engine that runs already."""

    # fmt: off
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name in metrics and logs; ROLE-N when unset.")
    role: Role = Field(description="What the router uses it for.")
    url: Annotated[str, AfterValidator(_check_url)] = Field(
        description="http://HOST:PORT, https://HOST:PORT, unix:/PATH, or dns+http://NAME:PORT "
        "for one engine at each address of a name.")
    kind: EngineName | None = Field(
        None, description="Which program it is; the `engine` setting when unset.")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable with the key that it asks for; it is sent none if "
        "unset.")
    # fmt: on


RunningEngines = Annotated[
    tuple[Annotated[RunningEngine, BeforeValidator(_read_engine)], ...],
    BeforeValidator(read_list, json_schema_input_type=list[RunningEngine | str] | str),
]
EngineUrls = Annotated[
    tuple[Annotated[str, AfterValidator(_check_allowed)], ...],
    BeforeValidator(read_list, json_schema_input_type=list[str] | str),
]


def named(engines: Sequence[RunningEngine]) -> list[RunningEngine]:
    """Give a name to each engine that has none: ``prefill-0`` and so on. Raises ValueError."""
    taken = {engine.name for engine in engines}
    found: list[RunningEngine] = []
    for engine in engines:
        name = engine.name
        if name is None:
            numbers = (f"{engine.role}-{index}" for index in range(len(engines) + 1))
            name = next(each for each in numbers if each not in taken)
            taken.add(name)
        found.append(engine.model_copy(update={"name": name}))
    for what in ("name", "url"):
        values = [getattr(engine, what) for engine in found]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"two engines have the {what} {twice}")
    return found
