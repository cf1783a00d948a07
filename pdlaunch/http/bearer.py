"""Bearer tokens, compared in constant time."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from aiohttp import web


def has_bearer(http: web.Request, accepted: Collection[str]) -> bool:
    """Tell whether the request carries one of the ``accepted`` keys in its Authorization header."""
    scheme, _, given = http.headers.get("Authorization", "").partition(" ")
    key = given.strip().encode(errors="surrogateescape")
    # All of them are compared, so that the time says nothing about which one nearly matched.
    matches = [secrets.compare_digest(key, known.encode()) for known in accepted]
    return scheme.lower() == "bearer" and any(matches)
