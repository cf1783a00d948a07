"""Names engines that somebody else started."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from pdlaunch.config.field_types import FrozenModel, read_list
from pdlaunch.config.roles import Role

UNIX = "unix:"
# A label of a DNS name (RFC 1035), or an IPv6 address
_LABEL = re.compile(r"[a-z0-9_:-]{1,63}", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


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
    """Return the parts of ``http(s)://HOST:PORT`` or ``unix:/PATH``. Raises ValueError."""
    if url.startswith(UNIX):
        path = url.removeprefix(UNIX)
        if not path.startswith("/") or posixpath.normpath(path) != path or "\0" in path:
            raise ValueError(f"{url[:100]!r}: write the whole path of the socket: unix:/run/x.sock")
        return EngineAddress("unix", "", 0, path)
    if "@" in url:
        raise ValueError("a URL holds no user or key here; name the key's variable in api_key_env")
    try:
        parts = urlsplit(url)
        port = parts.port  # raises when it is none
    except ValueError:
        raise ValueError(f"{url[:100]!r} is no URL") from None
    # A name with its root dot is the same name.
    host = (parts.hostname or "").rstrip(".")
    # A path or a query would be dropped or sent along: neither is what was meant.
    plain = f"{parts.scheme}://{parts.netloc}"
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not host
        or url.rstrip("/") != plain
        # DNS has no others, and Python raises another error for them than for a name unknown.
        or not all(map(_LABEL.fullmatch, host.split(".")))
    ):
        raise ValueError(
            f"{url[:100]!r} is no URL of an engine; write http://HOST:PORT, https://HOST:PORT "
            "or unix:/PATH"
        )
    return EngineAddress(parts.scheme, host.lower(), port or _DEFAULT_PORTS[parts.scheme])


def _check_url(url: str) -> str:
    return str(read_engine_url(url))


def _read_engine(value: object) -> object:
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
        description="http://HOST:PORT, https://HOST:PORT or unix:/PATH.")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable with the key that it asks for; it is sent none if "
        "unset.")
    # fmt: on


RunningEngines = Annotated[
    tuple[Annotated[RunningEngine, BeforeValidator(_read_engine)], ...],
    BeforeValidator(read_list),
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
