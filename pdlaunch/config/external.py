"""Settings for running engines that this launch did not start."""

import posixpath
import re
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from pdlaunch.config.field_types import FrozenModel, read_list
from pdlaunch.config.http_names import url_of
from pdlaunch.config.roles import Role

UNIX = "unix:"  # begins the URL of an engine that listens on a Unix socket; the rest is its path
# A label of a DNS name (RFC 1035), or an IPv6 address
_LABEL = re.compile(r"[a-z0-9_:-]{1,63}", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def read_engine_url(url: str) -> str:
    """Return ``http(s)://HOST:PORT`` or ``unix:/PATH`` in one form. Raises ValueError."""
    if url.startswith(UNIX):
        path = url.removeprefix(UNIX)
        if not path.startswith("/") or posixpath.normpath(path) != path or "\0" in path:
            raise ValueError(f"{url[:100]!r}: write the whole path of the socket: unix:/run/x.sock")
        return url
    if "@" in url:
        raise ValueError("a URL must hold no user or key; name the key's variable in api_key_env")
    try:
        parts = urlsplit(url)
        port = parts.port  # Raises ValueError if this is not a port
    except ValueError:
        raise ValueError(f"{url[:100]!r} is not a URL") from None
    # A trailing dot (the DNS root) does not change a name.
    host = (parts.hostname or "").rstrip(".")
    # Refuse a path or a query: it would be dropped or sent along, and the user means neither.
    plain = f"{parts.scheme}://{parts.netloc}"
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not host
        or url.rstrip("/") != plain
        # DNS allows no other labels; Python's error for them is not that of an unknown name.
        or not all(map(_LABEL.fullmatch, host.split(".")))
    ):
        fix = "write http://HOST:PORT, https://HOST:PORT or unix:/PATH"
        raise ValueError(f"{url[:100]!r} is not the URL of an engine; {fix}")
    return url_of(parts.scheme, host.lower(), port or _DEFAULT_PORTS[parts.scheme])


def _read_engine(value: object) -> object:
    if isinstance(value, str):
        role, equals, url = value.partition("=")
        if not equals:
            raise ValueError(f"{value[:100]!r}: write prefill=URL, decode=URL or both=URL")
        return {"role": role.strip(), "url": url.strip()}
    return value


class RunningEngine(FrozenModel):
    """Describes an engine that already runs."""

    # fmt: off
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name in metrics and logs; ROLE-N when unset.")
    role: Role = Field(description="What the router uses it for.")
    url: Annotated[str, AfterValidator(read_engine_url)] = Field(
        description="http://HOST:PORT, https://HOST:PORT or unix:/PATH.")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the engine's key; when unset, no key is "
        "sent.")
    # fmt: on


RunningEngines = Annotated[
    tuple[Annotated[RunningEngine, BeforeValidator(_read_engine)], ...],
    BeforeValidator(read_list),
]


def named(engines: Sequence[RunningEngine]) -> list[RunningEngine]:
    """Name the nameless engines ``prefill-0`` and so on. Raises ValueError for duplicates."""
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
