"""Keeps out what a web page of somebody else must not be able to send to routers and engines.

A browser lets any page send requests to ``127.0.0.1``, and a page whose own name is made to resolve
to it (DNS rebinding) may read the answers too. Checks before any key is asked for close this:

- **Host** must be a loopback name or address, the address the connection came in on, the name the
  server was bound to, or one of ``allowed_hosts``. A rebound page sends its own name.
- **Origin**, which browsers add to whatever a page sends elsewhere, must be the server's own or one
  of ``cors_origins``.
- **Content-Type** of a body must be ``application/json``: other types are what a page may send
  without asking first.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from pdlaunch.config.http_names import ANY, WILDCARDS, is_loopback
from pdlaunch.errors import RequestError
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER, REQUEST_ID_HEADER

# Probes of load balancers send any Host, and the answer gives nothing away.
HOST_FREE_PATHS = frozenset({"/health", "/ping"})
PREFLIGHT_MAX_AGE_S = 600
_EXPOSED_HEADERS = f"{REQUEST_ID_HEADER}, {IGNORED_FIELDS_HEADER}, Retry-After"


class Guard:
    """Checks every request of one server. ``bind_host``: what the server was told to listen on."""

    def __init__(
        self,
        bind_host: str,
        *,
        allowed_hosts: tuple[str, ...] = (),
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        own = {bind_host, socket.gethostname()} if bind_host in WILDCARDS else {bind_host}
        self._hosts = frozenset(_plain(name) for name in {"localhost", *own, *allowed_hosts} - {""})
        self._any_host = ANY in allowed_hosts
        self._origins = frozenset(origin.rstrip("/").lower() for origin in cors_origins)

    def admit(self, http: web.Request) -> web.Response | None:
        """Let the request pass (None), or answer it when it is the preflight of a listed origin.
        Raises RequestError.
        """
        if not self._is_own_host(http):
            shown = ", ".join(http.headers.getall(hdrs.HOST, []))[:200]
            raise RequestError(
                f"Host {shown!r} is none of this server; add its name to the setting "
                "allowed_hosts if it is",
                status=421,
                code="host_not_allowed",
            )
        is_listed = self._is_listed(http)
        if hdrs.ORIGIN in http.headers and not is_listed and not _is_same_origin(http):
            raise RequestError(
                f"pages of origin {http.headers[hdrs.ORIGIN][:200]!r} may not use this server; add "
                "it to the setting cors_origins if they may",
                status=403,
                code="origin_not_allowed",
            )
        wants_preflight = hdrs.ACCESS_CONTROL_REQUEST_METHOD in http.headers
        if is_listed and http.method == hdrs.METH_OPTIONS and wants_preflight:
            # Any headers: keys, not preflights, decide what they open.
            wanted = http.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
            headers = {
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD, POST",
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: wanted,
                hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_MAX_AGE_S),
            }
            return web.Response(status=204, headers=headers)
        if http.body_exists and http.content_type != "application/json":
            raise RequestError(
                "Content-Type must be application/json", status=415, code="unsupported_media_type"
            )
        encoding = http.headers.get(hdrs.CONTENT_ENCODING, "identity")
        if encoding.lower() != "identity":
            # Limits count the bytes that come: inflated, they could be a thousand times more.
            raise RequestError(
                f"Content-Encoding {encoding[:100]!r} is not supported; send the body as it is",
                status=415,
                code="unsupported_encoding",
            )
        return None

    async def add_cors_headers(self, http: web.Request, response: web.StreamResponse) -> None:
        """Let pages of a listed origin read the answer; aiohttp calls this with each answer."""
        if self._origins:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if self._is_listed(http):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = http.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS

    def _is_own_host(self, http: web.Request) -> bool:
        if self._any_host or http.path in HOST_FREE_PATHS:
            return True
        # Two Host headers: servers disagree on which one counts, so neither does.
        given = http.headers.getall(hdrs.HOST, [])
        host = _host_name(given[0]) if len(given) == 1 else ""
        name = None if http.transport is None else http.transport.get_extra_info("sockname")
        own_address = name[0].partition("%")[0] if isinstance(name, tuple) else None
        return host in self._hosts or is_loopback(host) or host == own_address

    def _is_listed(self, http: web.Request) -> bool:
        origins = http.headers.getall(hdrs.ORIGIN, [])
        return len(origins) == 1 and (ANY in self._origins or origins[0].lower() in self._origins)


def _is_same_origin(http: web.Request) -> bool:
    """Compare host and port: behind a proxy that ends TLS the server does not know the scheme."""
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
        _ = parts.port  # raises when it is none
    except ValueError:
        return ""
    is_plain = parts.netloc == host_header and "@" not in host_header
    return _plain(parts.hostname or "") if is_plain else ""


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()
