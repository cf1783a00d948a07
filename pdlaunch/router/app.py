"""Answers the public HTTP API of a deployment, and serves the page that shows it.

The page consists of files that hold no data. It asks for the clients' key and sends it as a header,
so that it stands in no URL.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from functools import partial
from importlib import resources

from aiohttp import hdrs, web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import (
    AppRoute,
    HttpApp,
    KeyCheck,
    bearer_check,
    health_routes,
    model_routes,
)
from pdlaunch.http.errors import json_response
from pdlaunch.http.guard import Guard
from pdlaunch.http.limits import Admission
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.router.admin import Admin, came_through_admin_socket
from pdlaunch.router.deployment_view import DeploymentView
from pdlaunch.router.metrics import scrape
from pdlaunch.router.otlp import OtlpExporter
from pdlaunch.router.prompt_endpoints import PromptEndpoints, shutting_down
from pdlaunch.router.request_history import RequestHistory
from pdlaunch.router.state import RouterState
from pdlaunch.router.supervisor_link import SupervisorLink

logger = logging.getLogger(__name__)

_SCRIPTS = ("main.js", "dom.js", "boxes.js", "flow.js", "charts.js", "requests.js", "tables.js")
_PAGE_FILES = {
    "/pdlaunch/": ("page.html", "text/html"),
    "/pdlaunch/page.css": ("page.css", "text/css"),
    **{f"/pdlaunch/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
PAGE_PATHS = ("/", *_PAGE_FILES)

_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Another version of pdlaunch has another page.
    hdrs.CACHE_CONTROL: "no-cache",
}

OPEN_PATHS = ("/health", "/ping", "/metrics", *PAGE_PATHS)  # need no key; the page holds no data
CLOSE_TIMEOUT_S = 1.0  # seconds that clients may take to read that the router leaves


class RouterApp:
    """Answers every endpoint; ``app`` is what aiohttp serves, with ``handler_cancellation`` on.

    ``show_request`` takes the line of each request for a terminal.
    """

    def __init__(
        self,
        spec: RouterSpec,
        state: RouterState,
        supervisor: SupervisorLink,
        show_request: Callable[[str], None] | None = None,
    ) -> None:
        self._spec = spec
        self._state = state
        self._started = int(time.time())
        self.admission = Admission(spec.max_queued_requests, shutting_down)
        self.view = DeploymentView(state, self.admission, spec.served_model_name)
        self._prompts = PromptEndpoints(spec, state, self.admission)
        exporter = spec.otlp_endpoint and OtlpExporter(spec.otlp_endpoint, spec.otlp_sample)
        self.history = RequestHistory(
            spec.kept_requests, show_request, exporter or None, state.spawn
        )
        check_admin_key = _admin_key_check(spec.admin_api_key)
        check_key = None
        if spec.api_key is not None:
            message = "the API key is missing or wrong"
            check_key = bearer_check([spec.api_key], message=message, code="invalid_api_key")
        self.app = HttpApp(
            [
                *self._prompts.routes(),
                *model_routes(self._model_cards),
                *health_routes(self._health),
                AppRoute("GET", "/metrics", self._metrics),
                *self.view.routes(),
                *self.history.routes(),
                *(page_routes() if spec.page else []),
                *(
                    route._replace(check_key=check_admin_key)
                    for route in Admin(state, supervisor).routes()
                ),
            ],
            guard=Guard(
                spec.host, allowed_hosts=spec.allowed_hosts, cors_origins=spec.cors_origins
            ),
            check_key=check_key,
            metrics=state.metrics.requests,
            max_body_bytes=spec.max_body_bytes,
            open_paths=OPEN_PATHS,
            is_trusted=came_through_admin_socket,
            watch=self.history.begin,
        ).app

    async def close(self) -> None:
        """End every running request with an error.

        Waits at most ``CLOSE_TIMEOUT_S`` for the last client to be told.
        """
        self._prompts.close()
        await self.view.close()
        if not await self.admission.drain(CLOSE_TIMEOUT_S):
            num_left = self.admission.in_flight
            logger.warning("%d requests could not be told that the router leaves", num_left)
        await self.history.close()

    def _model_cards(self) -> list[ModelCard]:
        """Describe the served model, and what else engines with names of their own have told."""
        pool, name = self._state.pool, self._spec.served_model_name
        max_model_len = (
            pool.max_model_len("decode")
            or pool.max_model_len("both")
            or pool.max_model_len("prefill")
        )
        own = ModelCard(id=name, created=self._started, root=name, max_model_len=max_model_len)
        others = {
            card.id: card
            for engine in pool.engines
            if engine.ready and engine.capabilities.has_own_fields
            for card in engine.models
        }
        return [own, *(card for card in others.values() if card.id != name)]

    async def _health(self, _: web.Request) -> web.Response:
        """Answer 200 once the launch is ready, while some engine can serve and the door is open."""
        status, engines = self.view.state(), self._state.pool.engines
        body = {"status": status, "engines": {engine.name: engine.state for engine in engines}}
        return json_response(body, status=200 if status == "ok" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        pool, metrics = self._state.pool, self._state.metrics
        metrics.show(pool, self.admission.in_flight)
        page = await scrape(metrics.text(), self._state.client, pool.engines)
        return web.Response(body=page, headers={"Content-Type": METRICS_CONTENT_TYPE})


def _admin_key_check(key: str | None) -> KeyCheck:
    if key is not None:
        message = "the admin API key is missing or wrong"
        return bearer_check([key], message=message, code="invalid_admin_api_key")

    def refuse(_: web.Request) -> None:
        raise RequestError(
            "commands are taken at the launch's admin socket alone (pdlaunch sleep finds it); "
            "set admin_api_key to open this",
            status=403,
            code="admin_api_key_unset",
        )

    return refuse


def page_routes() -> list[AppRoute]:
    """Return the routes of the page and of what it loads."""
    folder = resources.files("pdlaunch.router") / "static"
    routes = [AppRoute("GET", "/", _redirect)]
    for path, (name, kind) in _PAGE_FILES.items():
        answer = partial(_answer_file, (folder / name).read_bytes(), kind)
        routes.append(AppRoute("GET", path, answer))
    return routes


async def _redirect(_: web.Request) -> web.Response:
    # By a relative URL, as a proxy may have put a prefix before it.
    return web.Response(status=307, headers={hdrs.LOCATION: "pdlaunch/"} | _PAGE_HEADERS)


async def _answer_file(body: bytes, kind: str, http: web.Request) -> web.Response:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = _PAGE_HEADERS | {hdrs.ETAG: tag}
    if http.headers.get(hdrs.IF_NONE_MATCH) == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)
