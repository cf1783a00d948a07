"""Serves the page that shows the deployment: files of the package, which hold no data.

The page asks for the clients' key and sends it as a header, so that it stands in no URL, and takes
everything from ``/pdlaunch/stream`` and ``/pdlaunch/requests``.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib import resources

from aiohttp import hdrs, web

from pdlaunch.http.app import AppRoute, Operation

_SCRIPTS = ("main.js", "dom.js", "boxes.js", "flow.js", "charts.js", "requests.js", "tables.js")
_FILES = {
    "/pdlaunch/": ("page.html", "text/html"),
    "/pdlaunch/page.css": ("page.css", "text/css"),
    **{f"/pdlaunch/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
PAGE_PATHS = ("/", *_FILES)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # It is asked every time whether the page has changed, as with another version of pdlaunch.
    hdrs.CACHE_CONTROL: "no-cache",
}


def page_routes() -> list[AppRoute]:
    """Return the routes of the page and of what it loads."""
    folder = resources.files("pdlaunch.router") / "static"
    return [
        AppRoute("GET", "/", _redirect, "Lead to the page."),
        *(
            AppRoute(
                "GET",
                path,
                partial(_answer, (folder / name).read_bytes(), kind),
                Operation("Return a part of the page.", content_type=kind),
            )
            for path, (name, kind) in _FILES.items()
        ),
    ]


async def _redirect(_: web.Request) -> web.Response:
    """Lead to the page by a relative URL, as a proxy may have put a prefix before it."""
    return web.Response(status=307, headers={hdrs.LOCATION: "pdlaunch/"} | _HEADERS)


async def _answer(body: bytes, kind: str, http: web.Request) -> web.Response:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if http.headers.get(hdrs.IF_NONE_MATCH) == tag:
        return web.Response(status=304, headers=_HEADERS | {hdrs.ETAG: tag})
    return web.Response(
        body=body, content_type=kind, charset="utf-8", headers=_HEADERS | {hdrs.ETAG: tag}
    )
