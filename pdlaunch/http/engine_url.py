"""Opens connections to engines, whose URL names a TCP port or a Unix socket.

A socket in the launch's folder is open to the user who started the launch alone.
"""

from __future__ import annotations

import ssl
from typing import Any

import aiohttp

UNIX = "unix:"
"""Begins the URL of an engine that listens on a Unix socket; the rest is its path."""
KEEPALIVE_S = 2.0
"""Shorter than any engine's own, so that no request is sent into a connection that is being
closed.
"""


def new_session(
    url: str,
    *,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> aiohttp.ClientSession:
    """Return a session whose requests go to one engine; ``options`` are the session's.

    ``tls``: what an https URL is called with; without it the system's authorities are trusted.
    """
    # No limit: routers admit requests by themselves, and one here would make them wait unseen.
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(url.removeprefix(UNIX), limit=0, keepalive_timeout=KEEPALIVE_S)
        if url.startswith(UNIX)
        else aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=tls or True)
    )
    return aiohttp.ClientSession(connector=connector, **options)


def describe_client_error(error: Exception) -> str:
    """Say why a call had no answer. The error's ``repr`` would show the key that was sent, and what
    is no HTTP may quote anything.
    """
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{type(error).__name__}: its answer is no valid HTTP"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def http_url(url: str) -> str:
    """Return the URL that requests to an engine begin with."""
    return "http://localhost" if url.startswith(UNIX) else url
