"""An engine that follows the protocol; ``fake_generation.py`` makes its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry

from pdlaunch.config.roles import Role
from pdlaunch.engine.server.engine_service import ServerMetrics
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER, SPANS_HEADER
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, KVFeed
from pdlaunch.observe.metrics import render_metrics
from pdlaunch.protocol.control import Address, Capabilities, Entry, ListedState, Withheld
from tests.router.fake_generation import Job, Seen


async def until(condition: Callable[[], object]) -> None:
    """Let the others run until the condition holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for is plain state
        await asyncio.sleep(0)


class FakeEngine:
    """Follows the protocol as told: ``status`` answers every generation with that status;
    ``die_after`` breaks the connection after so many chunks of a stream (0: before the headers);
    ``hold_after`` waits there for ``go``; ``error_after`` sends an error event; ``ends`` maps a
    choice to its number of tokens, the last of which is EOS.
    """

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role: Role = role
        self.has_rank = True
        self.max_model_len = 4096
        self.models = ["tiny"]
        self.capabilities = Capabilities()
        self.incarnation = 1
        self.rank_incarnation = 1
        self.seen: list[Seen] = []
        self.leases: dict[str, Any] = {}
        self.released: list[str] = []
        self.commands: list[tuple[str, str, str]] = []
        self.sleeping = False
        self.withheld: Withheld = ""
        self.stalls = False
        self.release_event = asyncio.Event()
        self.num_aborted = 0
        self.num_tokenized = 0
        self.aborted = asyncio.Event()
        self.status: int | None = None
        self.error_body = (
            b'{"error": {"message": "made up", "type": "server_error", "param": null, '
            b'"code": null}}'
        )
        self.die_after: int | None = None
        self.error_after: int | None = None
        self.hold_after: int | None = None
        self.hold_prefill = False
        self.holding = asyncio.Event()
        self.go = asyncio.Event()
        self.ends: dict[int, int] = {}
        self.may_die: Callable[[], bool] = lambda: True
        self.spoil: Callable[[dict[str, Any]], object] = lambda _: None
        """Changes a whole answer."""
        self.padding = ""
        self.ignored_fields: str | None = None
        self.metrics = ServerMetrics(CollectorRegistry(), engine=name, role=role, model_name="tiny")
        self.kv_feed = KVFeed()
        self.host = ""
        # Engines that share a GPU are asked in pairs.
        self.devices: tuple[str, ...] = ("cuda:0",)
        self.metrics_page: str | None = None
        self.tells_metrics = asyncio.Event()
        self.tells_metrics.set()
        self.report: Any = None
        """What it tells a router of its spans that asks for them."""
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.post("/v1/completions", self._generate),
                web.post("/v1/chat/completions", self._generate),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
                web.post("/pdlaunch/release", self._release),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.post("/sleep", self._fall_asleep),
                web.post("/wake_up", self._wake_up),
                web.get("/is_sleeping", self._is_sleeping),
                web.get(KV_EVENTS_PATH, self.kv_feed.send),
            ]
        )
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def entries(self, *, ready: bool = True) -> list[Entry]:
        state: ListedState = "sleeping" if self.sleeping else "ready" if ready else "starting"
        if self.stalls:
            state = "stalled"
        server = Entry(
            name=self.name,
            kind="server",
            host=self.host,
            incarnation=self.incarnation,
            engine=self.name,
            role=self.role,
            devices=self.devices,
            address=Address(http=self.url),
            capabilities=self.capabilities,
            state=state,
            withheld=self.withheld,
        )
        if not self.has_rank:
            return [server]
        rank = Entry(
            name=f"{self.name}/rank-0",
            kind="rank",
            incarnation=self.rank_incarnation,
            engine=self.name,
            engine_id=f"id-of-{self.name}",
            address=Address(side_channel="tcp://127.0.0.1:1"),
            state=state,
        )
        return [server, rank]

    async def _fall_asleep(self, request: web.Request) -> web.Response:
        self.commands.append((self.name, request.path_qs, request.headers["Authorization"]))
        if self.status is not None:
            return web.Response(
                status=self.status, body=self.error_body, content_type="application/json"
            )
        self.sleeping = True
        return web.json_response(
            {"is_sleeping": True, "sleeping_tags": ["weights", "kv_cache"], "num_bytes": 7}
        )

    async def _wake_up(self, request: web.Request) -> web.Response:
        self.commands.append((self.name, request.path_qs, request.headers["Authorization"]))
        self.sleeping = False
        return web.json_response({"is_sleeping": False, "sleeping_tags": [], "num_bytes": 7})

    async def _is_sleeping(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"is_sleeping": self.sleeping, "sleeping_tags": [], "num_bytes": 0}
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen = Seen(request.path, request.headers.copy(), body)
        self.seen.append(seen)
        try:
            return await self._answer(request, seen)
        except (asyncio.CancelledError, ConnectionError):
            self.num_aborted += 1
            self.aborted.set()
            raise

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        if self.status is not None:
            return web.Response(
                status=self.status, body=self.error_body, content_type="application/json"
            )
        refusal = self._refusal(seen.body)
        if refusal is not None:
            error = {
                "message": refusal,
                "type": "invalid_request_error",
                "param": refusal.split()[0],
                "code": None,
            }
            return web.json_response({"error": error}, status=400)
        job = Job(self, seen)
        if seen.body.get("stream") and not job.is_prefill:
            return await self._stream(request, job, self._reported(seen))
        if self.hold_prefill:
            self.holding.set()
            await self.go.wait()
        if self.die_after == 0:
            _break(request)
        whole = job.whole() | self._reported(seen)
        self.spoil(whole)
        return web.Response(
            body=msgspec.json.encode(whole), content_type="application/json", headers=self._told()
        )

    def _reported(self, seen: Seen) -> dict[str, Any]:
        asked = seen.headers.get(SPANS_HEADER) == "1"
        return {"pdlaunch": self.report} if asked and self.report is not None else {}

    def _told(self) -> dict[str, str]:
        told = self.ignored_fields
        return {} if told is None else {IGNORED_FIELDS_HEADER: told}

    def _refusal(self, body: dict[str, Any]) -> str | None:
        if body.get("temperature", 0) < 0:
            return "temperature must not be negative"
        params = body.get("kv_transfer_params") or {}
        prefill = params.get("do_remote_decode")
        if prefill and (body.get("max_tokens") != 1 or body.get("stream")):
            return "max_tokens must be 1 and stream false"
        if body.get("stream_options") and not body.get("stream"):
            return "stream_options needs stream"
        if not prefill and (body.get("min_tokens") or 0) > (body.get("max_tokens") or 16):
            return "min_tokens is more than max_tokens"
        return None

    async def _open_stream(self, request: web.Request) -> web.StreamResponse:
        if self.die_after == 0:
            _break(request)
        response = web.StreamResponse(headers=self._told() | {"Content-Type": "text/event-stream"})
        await response.prepare(request)
        return response

    async def _stream(
        self, request: web.Request, job: Job, reported: dict[str, Any]
    ) -> web.StreamResponse:
        response = await self._open_stream(request)

        async def send(payload: object) -> None:
            await response.write(b"data: " + msgspec.json.encode(payload) + b"\n\n")

        for chunk in job.opening():
            await send(chunk)
        async for num_sent, chunk in self._paced(request, job.chunks()):
            if num_sent == self.error_after:
                await response.write(b"data: " + self.error_body + b"\n\n")
                await response.write_eof()
                return response
            await send(chunk)
        if (job.body.get("stream_options") or {}).get("include_usage"):
            await send(job.head() | {"choices": [], "usage": job.usage()})
        if reported:
            await send({"choices": []} | reported)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _paced(
        self, request: web.Request, chunks: list[dict[str, Any]]
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        for num_sent, chunk in enumerate(chunks):
            if num_sent == self.hold_after:
                self.holding.set()
                await self.go.wait()
            if num_sent == self.die_after:
                # What a dead connection still held is lost: wait until the router has read what the
                # test counts on.
                await until(self.may_die)
                _break(request)
            yield num_sent, chunk

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": name, "max_model_len": self.max_model_len} for name in self.models]
        return web.json_response({"object": "list", "data": cards})

    async def _metrics(self, request: web.Request) -> web.Response:
        await self.tells_metrics.wait()
        return web.Response(
            text=self.metrics_page or render_metrics(self.metrics.registry).decode()
        )

    async def _release(self, request: web.Request) -> web.Response:
        request_id = (await request.json())["request_id"]
        self.released.append(request_id)
        self.leases.pop(request_id, None)
        self.release_event.set()
        return web.Response()

    async def _detokenize(self, request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.num_tokenized += 1
        return web.json_response(
            {"count": 2, "tokens": [1, 2], "max_model_len": self.max_model_len}
        )


def _break(request: web.Request) -> NoReturn:
    """The connection ends as with the process."""
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError
