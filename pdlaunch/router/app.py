"""Answers the public HTTP API of a deployment, and serves the page that shows its status.

The page's files hold no data. The page asks the user for an API key and sends it as a header, so
the key appears in no URL.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST

from pdlaunch.config.roles import Role
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http import headers, limits
from pdlaunch.http.app import (
    AppRoute,
    Guard,
    HttpApp,
    KeyCheck,
    bearer_check,
    health_routes,
    model_routes,
    request_id_of,
)
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S, error_status, json_response, unavailable
from pdlaunch.http.sse import ClientStream
from pdlaunch.protocol.control import MODEL_CHANGED, WHY_WITHHELD
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.router import responses
from pdlaunch.router.admin import Admin, SupervisorLink, came_through_admin_socket
from pdlaunch.router.answers import ClientAnswer
from pdlaunch.router.client_request import (
    CHAT,
    COMPLETIONS,
    ClientRequest,
    Endpoint,
    read_client_request,
)
from pdlaunch.router.clients import Client
from pdlaunch.router.continuation import Transcript
from pdlaunch.router.deployment_view import DeploymentView
from pdlaunch.router.engine import EngineKey
from pdlaunch.router.engine_client import EngineFailure
from pdlaunch.router.metrics import scrape
from pdlaunch.router.relay import Relay
from pdlaunch.router.request_history import RequestHistory, record_of
from pdlaunch.router.state import RouterState

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("static")
_PAGE_FILES = {f"/pdlaunch/{file.name}": file for file in sorted(_PAGE.iterdir())}
_PAGE_FILES["/pdlaunch/"] = _PAGE_FILES.pop("/pdlaunch/page.html")
PAGE_PATHS = ("/", *_PAGE_FILES)

_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # After an update of pdlaunch, browsers must load the new page.
    hdrs.CACHE_CONTROL: "no-cache",
}

OPEN_PATHS = ("/health", "/ping", "/metrics", *PAGE_PATHS)  # need no key; the page holds no data
CLOSE_TIMEOUT_S = 1.0  # time for clients to read the error that the router shuts down
# Engines get at most this many characters of a client's request id, and then a suffix.
MAX_HOP_ID_LENGTH = 160


class RouterApp:
    """Answers every endpoint. aiohttp serves ``app`` with ``handler_cancellation`` on."""

    def __init__(self, spec: RouterSpec, state: RouterState, supervisor: SupervisorLink) -> None:
        self._spec = spec
        self._state = state
        self._started = int(time.time())
        self.admission = limits.Admission(spec.max_queued_requests, shutting_down)
        self.view = DeploymentView(state, self.admission, spec.served_model_name)
        self._deadlines = limits.Deadlines(spec.request_timeout_s, shutting_down)
        self._bodies = limits.BodyBudget(
            limits.NUM_BODIES * spec.max_body_bytes, spec.max_body_bytes
        )
        self.history = RequestHistory()
        check_admin_key = _admin_key_check(spec.admin_api_key)
        self.app = HttpApp(
            [
                *(
                    AppRoute("POST", e.path, partial(self._generate, e))
                    for e in (COMPLETIONS, CHAT)
                ),
                AppRoute("POST", "/v1/responses", partial(self._generate, CHAT, is_response=True)),
                AppRoute("POST", "/v1/embeddings", _no_embeddings),
                AppRoute("POST", "/tokenize", self._pass_on),
                AppRoute("POST", "/detokenize", self._pass_on),
                *model_routes(self._model_cards),
                *health_routes(self._health),
                AppRoute("GET", "/metrics", self._metrics),
                AppRoute("GET", "/pdlaunch/status", self.view.answer),
                AppRoute("GET", "/pdlaunch/requests", self.history.list_some),
                AppRoute("GET", "/pdlaunch/requests/{id:.+}", self.history.trace),
                AppRoute("GET", "/", _redirect),
                *(AppRoute("GET", path, _send_page_file) for path in _PAGE_FILES),
                *(
                    route._replace(check_key=check_admin_key)
                    for route in Admin(state, supervisor).routes()
                ),
            ],
            guard=Guard(spec.host, allowed_hosts=spec.allowed_hosts),
            check_key=state.clients.check,
            metrics=state.metrics.requests,
            max_body_bytes=spec.max_body_bytes,
            open_paths=OPEN_PATHS,
            is_trusted=came_through_admin_socket,
            watch=self.history.begin,
        ).app

    async def close(self) -> None:
        """End every running request with an error, and wait until the clients have it."""
        self._deadlines.close()
        await self.view.close()
        if not await self.admission.drain(CLOSE_TIMEOUT_S):
            num_left = self.admission.in_flight
            logger.warning("%d requests got no error before the router stopped", num_left)

    def _model_cards(self) -> list[ModelCard]:
        """Return the served model, and the other models (adapters) that engines of vLLM list."""
        pool, name = self._state.pool, self._spec.served_model_name
        roles: tuple[Role, ...] = ("decode", "both", "prefill")
        max_model_len = next(filter(None, map(pool.max_model_len, roles)), None)
        own = ModelCard(id=name, created=self._started, root=name, max_model_len=max_model_len)
        others = {
            card.id: card
            for engine in pool.engines
            if engine.ready and engine.capabilities.is_vllm
            for card in engine.models
        }
        return [own, *(card for card in others.values() if card.id != name)]

    async def _health(self, _: web.Request) -> web.Response:
        status, engines = self.view.state(), self._state.pool.engines
        states = {engine.name: engine.state for engine in engines}
        body: dict[str, Any] = {"status": status, "engines": states}
        if changed := [each.name for each in engines if MODEL_CHANGED in each.entry.reason]:
            body["model_changed"] = changed
        return json_response(body, status=200 if status == "ok" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        pool, metrics = self._state.pool, self._state.metrics
        metrics.show(pool.engines, self.admission.in_flight)
        for each in self._state.clients:
            metrics.show_key(each.name, each.num_running, len(each.flow.waiting))
        page = await scrape(metrics.text(), self._state.client, pool.engines)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _generate(
        self, endpoint: Endpoint, http: web.Request, *, is_response: bool = False
    ) -> web.StreamResponse:
        if withheld := self._state.pool.registry.withheld:
            reason = WHY_WITHHELD[withheld]
            raise unavailable(reason, withheld)
        # Keep the body until the answer is complete: after a failure another engine gets it.
        async with self._bodies.read(http) as body:
            writer = None
            if is_response:
                translate = partial(responses.read_response_request, body, request_id_of(http))
                body, writer = await limits.work_at_input(
                    len(body) >= limits.LARGE_BODY_BYTES, translate
                )
            request = await self._read(endpoint, http, body)
            record, num_prompts = record_of(http), len(request.prompts)
            record.understood(request.fields.model, num_prompts)
            client = self._state.clients.of(http)
            num_tokens = sum(each.num_prompt_tokens for each in request.prompts)
            with (
                self.admission.admit(num_prompts),
                client.admit(
                    num_prompts,
                    num_tokens + request.num_output_tokens,
                    lambda: record.used_tokens(num_tokens),
                ),
                self._state.metrics.requests.in_flight.track_inprogress(),
            ):
                return await self._answer(http, request, client, writer)

    async def _read(self, endpoint: Endpoint, http: web.Request, body: bytes) -> ClientRequest:
        given, request_id = http.headers, request_id_of(http)
        read = partial(
            read_client_request,
            endpoint,
            body,
            served_model_name=self._spec.served_model_name,
            request_id=request_id,
            hop_id=_hop_id(request_id) if headers.REQUEST_ID_HEADER in given else HopId(request_id),
            headers={headers.SPANS_HEADER: "1"} | headers.headers_to_pass(given),
            wants_pair=given.get(headers.ROUTE_HEADER) == headers.WANTS_PAIR,
            session=given.get(headers.SESSION_HEADER, ""),
            is_vllm=self._state.pool.is_vllm,
            is_fair=self._state.turns.is_fair,
        )
        return await limits.work_at_input(len(body) >= limits.LARGE_BODY_BYTES, read)

    async def _answer(
        self,
        http: web.Request,
        request: ClientRequest,
        client: Client,
        writer: responses.ResponseWriter | None,
    ) -> web.StreamResponse:
        """Answer all prompts concurrently. The first error cancels the others and is the answer."""
        state, record = self._state, record_of(http)
        stream: ClientStream | None = None
        if request.fields.stream:
            own = {headers.REQUEST_ID_HEADER: request_id_of(http)}
            stream = (
                responses.ResponseStream(http, own, writer) if writer else ClientStream(http, own)
            )
        metrics = state.metrics.requests
        answer = ClientAnswer(request, metrics, record, stream)
        try:
            async with self._deadlines.start()():
                prompts = request.prompts
                answers = [Relay(each, state, answer).run(client) for each in prompts]
                response = await answer.finish(await _together(answers))
                if writer is not None and isinstance(response, web.Response):
                    return responses.whole_response(response, writer)
                return response
        except Exception as error:
            if isinstance(error, ConnectionError) or stream is None or not stream.has_begun:
                raise
            # The status has been sent, so the error can only be an event.
            metrics.failed(error_status(error))
            record.fail(error)
            await answer.flush()
            await stream.fail(error)
            return stream.response

    async def _pass_on(self, http: web.Request) -> web.Response:
        pool, tried = self._state.pool, frozenset[EngineKey]()
        own = {headers.SPANS_HEADER: "1", headers.REQUEST_ID_HEADER: _hop_id(request_id_of(http))}
        sent = own | headers.headers_to_pass(http.headers)
        client = self._state.clients.of(http)
        async with self._bodies.read(http) as body:
            with self.admission.admit(1), client.admit(1, 0, lambda: (0, 0)):
                while (engine := pool.pick_any(tried)) is not None:
                    try:
                        async with self._deadlines.start()():
                            answer, ignored = await self._state.client.ask(
                                engine, http.path, body, sent
                            )
                        return web.Response(
                            body=answer,
                            content_type="application/json",
                            headers=headers.ignored_fields_header(ignored),
                        )
                    except EngineFailure:
                        engine.health.failed(pool.clock())
                        tried |= {engine.key}
        raise unavailable("no engine is ready", "no_engine_ready")


async def _no_embeddings(_: web.Request) -> web.StreamResponse:
    message = (
        "embeddings are not served: the model of this deployment generates text; run `vllm serve "
        "MODEL --runner pooling` for embeddings"
    )
    raise RequestError(message, status=404, code="not_found")


def _admin_key_check(key: str | None) -> KeyCheck:
    if key is not None:
        message = "the admin API key is missing or wrong"
        return bearer_check([key], message=message, code="invalid_admin_api_key")

    def refuse(_: web.Request) -> None:
        message = (
            "commands work only at the launch's admin socket (`pdlaunch sleep` finds it); set "
            "admin_api_key to allow them here"
        )
        raise RequestError(message, status=403, code="admin_api_key_unset")

    return refuse


async def _redirect(_: web.Request) -> web.Response:
    # The URL is relative, because a proxy may have added a prefix to the path.
    return web.Response(status=307, headers={hdrs.LOCATION: "pdlaunch/"} | _PAGE_HEADERS)


async def _send_page_file(http: web.Request) -> web.FileResponse:
    return web.FileResponse(_PAGE_FILES[http.path], headers=_PAGE_HEADERS)


def _hop_id(request_id: HttpRequestId) -> HopId:
    return HopId(f"{request_id[:MAX_HOP_ID_LENGTH]}-{secrets.token_hex(4)}")


async def _together(works: Sequence[Coroutine[Any, Any, Transcript]]) -> list[Transcript]:
    """Run all ``works`` concurrently. The first error cancels the others and is raised."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task holds its error, and the error's traceback holds this frame. This cycle would keep
        # the request's body in memory until the garbage collector runs.
        tasks.clear()
        del task


def shutting_down() -> OverloadedError:
    """Return the error for requests that arrive while the router shuts down."""
    return unavailable("the deployment is shutting down", "draining", LEAVING_RETRY_AFTER_S)
