"""An engine that follows the protocol; its tokens are a pure function of (prompt, seed, choice,
position).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from pdlaunch.config.roles import Role
from pdlaunch.engine.server.engine_service import ServerMetrics
from pdlaunch.http.headers import SPANS_HEADER
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, KVFeed
from pdlaunch.protocol.control import Address, Capabilities, Entry, ListedState, Withheld

EOS = 0


def token_at(prompt: object, seed: int, choice: int, position: int) -> int:
    digest = hashlib.sha256(repr((prompt, seed, choice, position)).encode()).digest()
    return 1 + int.from_bytes(digest[:4], "big") % 9000


def expected_tokens(prompt: object, seed: int, choice: int, num_tokens: int) -> list[int]:
    return [token_at(prompt, seed, choice, position) for position in range(num_tokens)]


def text_of(token_ids: list[int]) -> str:
    return "".join("" if token_id == EOS else f" {token_id}" for token_id in token_ids)


async def until(condition: Callable[[], object]) -> None:
    """Let the others run until the condition holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for is plain state
        await asyncio.sleep(0)


def server(name: str, role: Role | None = None, **fields: Any) -> Entry:
    role = role or ("prefill" if name.startswith("prefill") else "decode")
    own = {"engine": name, "role": role, "address": Address(http=f"http://{name}")}
    return Entry(name=name, kind="server", **{"incarnation": 1, "state": "ready"} | own | fields)


def rank(engine: str, tp_rank: int = 0, tp_size: int = 1, **fields: Any) -> Entry:
    own = {"incarnation": 1, "state": "ready", "tp_rank": tp_rank, "tp_size": tp_size}
    return Entry(name=f"{engine}/rank-{tp_rank}", kind="rank", engine=engine, **own | fields)


class Seen:
    def __init__(self, path: str, headers: Any, body: dict[str, Any]) -> None:
        self.is_chat = path.endswith("chat/completions")
        self.headers = headers
        self.body = body
        self.params: dict[str, Any] = body.get("kv_transfer_params") or {}
        self.is_prefill = bool(self.params.get("do_remote_decode"))


class Job:
    """One generation: what each choice has, and what is still to come."""

    def __init__(self, engine: FakeEngine, seen: Seen) -> None:
        self.engine, self.seen = engine, seen
        self.body = body = seen.body
        self.prompt = body["messages"] if seen.is_chat else body["prompt"]
        self.num_choices = body.get("n") or 1
        self.max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        known: list[list[dict[str, Any]]] = [[] for _ in range(self.num_choices)]
        if "resume" in body:
            assert body["resume"]["sent"] is True
            known = body["resume"]["choices"]
            assert len(known) == self.num_choices
        elif (ours := seen.params.get("pdlaunch") or {}).get("first_token_sent"):
            known = [[token] for token in ours["first_tokens"]]
        self.told = [[token["token_id"] for token in tokens] for tokens in known]
        self.over = [bool(tokens and tokens[-1].get("finish_reason")) for tokens in known]
        self.is_continued = any(self.told)

    def opening(self) -> list[dict[str, Any]]:
        if not self.seen.is_chat or self.is_continued:
            return []
        roles = [self._choice(index, [], role="assistant") for index in range(self.num_choices)]
        return [self._head() | {"choices": roles}]

    def chunks(self) -> Iterator[dict[str, Any]]:
        for index, token_id, reason in self._draw():
            yield self._head() | {"choices": [self._choice(index, [token_id], reason)]}

    def ending(self) -> list[dict[str, Any]]:
        wanted = (self.body.get("stream_options") or {}).get("include_usage")
        return [self._head() | {"choices": [], "usage": self._usage()}] if wanted else []

    def whole(self) -> dict[str, Any]:
        reasons = {index: reason for index, _, reason in self._draw()}
        choices = [self._choice(i, ids, reasons[i]) for i, ids in enumerate(self.told)]
        if self.seen.is_chat:
            for choice in choices:
                choice["message"] = choice.pop("delta") | {"role": "assistant"}
        goes_on = self.seen.is_prefill and any(ids[-1] != EOS for ids in self.told)
        params = self._lease() if goes_on else None
        answer = {"choices": choices, "usage": self._usage(), "kv_transfer_params": params}
        return self._head() | answer

    def _draw(self) -> Iterator[tuple[int, int, str | None]]:
        """One token after the other, choices in turn, with its reason to end."""
        for position in range(self.max_tokens):
            for index, tokens in enumerate(self.told):
                if self.over[index] or len(tokens) > position:
                    continue
                token_id = token_at(self.prompt, self.body["seed"], index, position)
                reason = "length" if position + 1 == self.max_tokens else None
                if position + 1 == self.engine.ends.get(index):
                    token_id, reason = EOS, "stop"
                tokens.append(token_id)
                self.over[index] = reason is not None
                yield index, token_id, reason

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion" if self.seen.is_chat else "text_completion"
        if self.seen.is_chat and self.body.get("stream"):
            kind += ".chunk"
        return {"id": f"engine-{self.engine.name}", "object": kind, "created": 1, "model": "tiny"}

    def _lease(self) -> dict[str, Any]:
        lease = f"{self.seen.headers['X-Request-Id']}/0"
        self.engine.leases[lease] = self.prompt
        tokens = [
            {"token_id": token, "finish_reason": "stop" if token == EOS else None}
            for token, *_ in self.told
        ]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine.name,
            "remote_request_id": lease,
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "remote_block_ids": [[1]],
            "pdlaunch": {"first_tokens": tokens, "first_token_sent": False},
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self.prompt), sum(map(len, self.told))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0 if self.seen.is_prefill else prompt},
        }

    def _choice(
        self, index: int, token_ids: list[int], reason: str | None = None, **delta: str
    ) -> dict[str, Any]:
        text = text_of(token_ids)
        choice = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(token_ids)}
        choice |= {"delta": {"content": text} | delta} if self.seen.is_chat else {"text": text}
        return choice | ({"token_ids": token_ids} if self.body.get("return_token_ids") else {})

    def _logprobs(self, token_ids: list[int]) -> dict[str, Any] | None:
        if not self.body.get("logprobs") or not token_ids:
            return None
        if self.seen.is_chat:
            told = {"bytes": None, "top_logprobs": []}
            return {"content": [{"token": str(t), "logprob": -t / 100} | told for t in token_ids]}
        return {
            "tokens": [str(t) for t in token_ids],
            "token_logprobs": [-t / 100 for t in token_ids],
            "top_logprobs": [None for _ in token_ids],
            "text_offset": [0 for _ in token_ids],
        }


class FakeEngine:
    """Follows the protocol as told: ``status`` answers every generation with that status;
    ``die_after`` breaks the connection after so many chunks of a stream (0: before the headers);
    ``hold_after`` waits there for ``go``; ``error_after`` sends an error event; ``ends`` maps a
    choice to its number of tokens, the last of which is EOS; ``spoil`` changes an answer or a
    chunk;
    ``report`` is what it tells a router of its spans that asks for them.
    """

    job: Callable[..., Any] = Job

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
        self.state: ListedState = "ready"
        self.withheld: Withheld = ""
        self.num_aborted = 0
        self.num_tokenized = 0
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
        self.headers: dict[str, str] = {}
        self.metrics = ServerMetrics(CollectorRegistry(), engine=name, role=role, model_name="tiny")
        self.kv_feed = KVFeed()
        # Engines that share a GPU are asked in pairs.
        self.devices: tuple[str, ...] = ("cuda:0",)
        self.metrics_page: str | None = None
        self.tells_metrics = asyncio.Event()
        self.tells_metrics.set()
        self.report: Any = None
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
                web.post("/sleep", self._sleep),
                web.post("/wake_up", self._sleep),
                web.get("/is_sleeping", self._sleep),
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

    def entries(self, state: ListedState) -> list[Entry]:
        told = {"devices": self.devices, "capabilities": self.capabilities}
        told |= {"incarnation": self.incarnation, "withheld": self.withheld, "state": state}
        entries = [server(self.name, self.role, address=Address(http=self.url), **told)]
        if self.has_rank:
            entries.append(rank(self.name, incarnation=self.rank_incarnation, state=state))
        return entries

    async def _sleep(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            self.commands.append((self.name, request.path_qs, request.headers["Authorization"]))
            if self.status is not None:
                return self._error()
            self.state = "sleeping" if request.path == "/sleep" else "ready"
        sleeps = self.state == "sleeping"
        told = {"sleeping_tags": ["weights", "kv_cache"] if sleeps else [], "num_bytes": 7}
        return web.json_response({"is_sleeping": sleeps, **told})

    def _error(self) -> web.Response:
        body = self.error_body
        return web.Response(status=self.status or 0, body=body, content_type="application/json")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(request.path, request.headers.copy(), await request.json())
        self.seen.append(seen)
        try:
            return await self._answer(request, seen)
        except (asyncio.CancelledError, ConnectionError):
            self.num_aborted += 1
            raise

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        if self.status is not None:
            return self._error()
        if refusal := self._refusal(seen):
            error = {"message": refusal, "type": "invalid_request_error", "code": None}
            error["param"] = refusal.split()[0]
            return web.json_response({"error": error}, status=400)
        job = self.job(self, seen)
        asks = seen.headers.get(SPANS_HEADER) == "1"
        report = {"pdlaunch": self.report} if asks and self.report is not None else {}
        if seen.body.get("stream") and not seen.is_prefill:
            return await self._stream(request, job, report)
        if self.hold_prefill:
            self.holding.set()
            await self.go.wait()
        if self.die_after == 0:
            _break(request)
        whole = job.whole() | report
        self.spoil(whole)
        return web.Response(
            body=msgspec.json.encode(whole), content_type="application/json", headers=self.headers
        )

    def _refusal(self, seen: Seen) -> str:
        body = seen.body
        if body.get("temperature", 0) < 0:
            return "temperature must not be negative"
        if seen.is_prefill and (body.get("max_tokens") != 1 or body.get("stream")):
            return "max_tokens must be 1 and stream false"
        if body.get("stream_options") and not body.get("stream"):
            return "stream_options needs stream"
        if not seen.is_prefill and (body.get("min_tokens") or 0) > (body.get("max_tokens") or 16):
            return "min_tokens is more than max_tokens"
        return ""

    async def _stream(
        self, request: web.Request, job: Any, report: dict[str, Any]
    ) -> web.StreamResponse:
        if self.die_after == 0:
            _break(request)
        response = web.StreamResponse(headers=self.headers | {"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(data: bytes) -> None:
            await response.write(b"data: " + data + b"\n\n")

        for chunk in job.opening():
            await send(msgspec.json.encode(chunk))
        async for num_sent, chunk in self._paced(request, [*job.chunks()]):
            if num_sent == self.error_after:
                await send(self.error_body)
                await response.write_eof()
                return response
            self.spoil(chunk)
            await send(msgspec.json.encode(chunk))
        for chunk in (*job.ending(), *([{"choices": []} | report] if report else [])):
            await send(msgspec.json.encode(chunk))
        await send(b"[DONE]")
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
        page = self.metrics_page or generate_latest(self.metrics.registry).decode()
        return web.Response(text=page)

    async def _release(self, request: web.Request) -> web.Response:
        request_id = (await request.json())["request_id"]
        self.released.append(request_id)
        self.leases.pop(request_id, None)
        return web.Response()

    async def _detokenize(self, request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.num_tokenized += 1
        told = {"count": 2, "tokens": [1, 2], "max_model_len": self.max_model_len}
        return web.json_response(told)


def _break(request: web.Request) -> NoReturn:
    """The connection ends as with the process."""
    request.transport.abort()
    raise ConnectionResetError
