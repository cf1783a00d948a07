"""Refuses requests to routers and engines that a foreign web page may have sent.

A browser lets any page send requests to ``127.0.0.1``. A page whose own host name resolves to this
address (DNS rebinding) can read the answers, too. Checks before the key check prevent both:

- **Host** must be a loopback name or address, the local address of the connection, the host that
  the server listens on, or one of ``allowed_hosts``. A page with DNS rebinding sends its own name.
- **Origin**, which browsers add to requests to other sites, must be the server's own.
- **Content-Type** of a body must be ``application/json``: browsers let pages send a few other
  types without a preflight request.
"""

import socket
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from pdlaunch.config.http_names import ANY, WILDCARDS, is_loopback
from pdlaunch.errors import RequestError

# Load balancers send arbitrary Host headers to these, and the answers are not secret.
HOST_FREE_PATHS = frozenset({"/health", "/ping"})


class Guard:
    """Checks the requests of one server. ``bind_host``: the configured address to listen on."""

    def __init__(self, bind_host: str, *, allowed_hosts: tuple[str, ...] = ()) -> None:
        own = {bind_host, socket.gethostname()} if bind_host in WILDCARDS else {bind_host}
        self._hosts = frozenset(_plain(name) for name in {"localhost", *own, *allowed_hosts} - {""})
        self._any_host = ANY in allowed_hosts

    def check(self, http: web.Request) -> None:
        """Raise RequestError for a request that a foreign web page may have sent."""
        if not self._is_own_host(http):
            shown = ", ".join(http.headers.getall(hdrs.HOST, []))[:200]
            raise RequestError(
                f"Host {shown!r} is not a known name of this server; if clients should use it, "
                "add it to the setting allowed_hosts",
                status=421,
                code="host_not_allowed",
            )
        if hdrs.ORIGIN in http.headers and not _is_same_origin(http):
            raise RequestError(
                f"pages of origin {http.headers[hdrs.ORIGIN][:200]!r} may not use this server; to "
                "allow them, use a proxy that handles CORS and removes the header Origin",
                status=403,
                code="origin_not_allowed",
            )
        if http.body_exists and http.content_type != "application/json":
            raise RequestError(
                "Content-Type must be application/json", status=415, code="unsupported_media_type"
            )
        encoding = http.headers.get(hdrs.CONTENT_ENCODING, "identity")
        if encoding.lower() != "identity":
            # Limits count received bytes; decompressed, a body may be a thousand times larger.
            raise RequestError(
                f"Content-Encoding {encoding[:100]!r} is not supported; send the body as it is",
                status=415,
                code="unsupported_encoding",
            )

    def _is_own_host(self, http: web.Request) -> bool:
        if self._any_host or http.path in HOST_FREE_PATHS:
            return True
        # Refuse two Host headers: servers disagree on which of them counts.
        given = http.headers.getall(hdrs.HOST, [])
        host = _host_name(given[0]) if len(given) == 1 else ""
        name = None if http.transport is None else http.transport.get_extra_info("sockname")
        own_address = name[0].partition("%")[0] if isinstance(name, tuple) else None
        return host in self._hosts or is_loopback(host) or host == own_address


def _is_same_origin(http: web.Request) -> bool:
    """Compare host and port only: behind a TLS proxy, the server does not know the scheme."""
    origins, hosts = http.headers.getall(hdrs.ORIGIN), http.headers.getall(hdrs.HOST, [])
    try:
        places = [urlsplit(origin).netloc.lower() for origin in origins]
    except ValueError:
        return False
    return len(places) == 1 and places == [host.lower() for host in hosts]


def _host_name(host_header: str) -> str:
    """Return the name in a Host header; empty when the header is malformed.

    ``[::1]:8000`` is ``::1``, ``Example.com.:80`` is ``example.com``.
    """
    try:
        parts = urlsplit(f"//{host_header}")
        _ = parts.port  # raises ValueError if the port is invalid
    except ValueError:
        return ""
    is_plain = parts.netloc == host_header and "@" not in host_header
    return _plain(parts.hostname or "") if is_plain else ""


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()
