"""A server that answers as vLLM does what a sidecar asks: health, metrics, completions with KV."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

BLOCK_SIZE = 32
BYTES_OF_TOKEN = 1000


def answer_of(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) * (index + 7)) % 997 for index in range(count)]


@dataclass
class FakeVllm:
    """``shares``: leases of all engines that can read from each other, by request id."""

    name: str
    shares: MutableMapping[str, list[int]]
    moves_bytes: bool = True
    garbles: bool = False
    has_connector: bool = True
    side_channel: tuple[str, int] = ("127.0.0.1", 5600)
    model: str = "m"
    logprob_error: float = 0.0
    num_running: int = 0
    cache_dtype: str = "auto"
    version: str = "0.32.0+cpu"
    prompt_tokens: int = 0
    num_expired: int = 0
    num_failed_reads: int = 0
    # What dev mode tells; None: it is off.
    server_info: dict[str, Any] | None = None
    # What it answers in the place of a router.
    status: dict[str, Any] = field(default_factory=dict)
    healthy: bool = True
    # What dev mode tells; None: it is off.
    is_sleeping: bool | None = None
    # Share of its KV cache that is under lease.
    lends: float = 0.0
    # It is started with --enable-prompt-tokens-details.
    tells_cached: bool = True
    # KV bytes that other requests read while it answers one.
    num_bytes_of_others: int = 0
    num_bytes: int = 0
    seconds_read: float = 0.0
    num_pieces: int = 0
    num_looks: int = 0
    num_tokens: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    # Authorizations that it was sent.
    keys: set[str | None] = field(default_factory=set)
    # Cleared while its core computes nothing, though it says that it is healthy.
    moves: asyncio.Event = field(default_factory=asyncio.Event)
    # Prompt tokens; empty for a version that does not count where they came from.
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    # Requests that lend or read blocks wait for it; None: they do not wait.
    go: asyncio.Event | None = None
    # Awaited for each answer: what ranks of other hosts do for it.
    compute: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.moves.set()

    def app(self) -> web.Application:
        @web.middleware
        async def note_key(request: web.Request, handler: Any) -> web.StreamResponse:
            self.keys.add(request.headers.get("Authorization"))
            response: web.StreamResponse = await handler(request)
            return response

        app = web.Application(middlewares=[note_key])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        card = {"id": self.model, "max_model_len": 4096}
        for path, told in {
            "/version": lambda: {"version": self.version},
            "/v1/models": lambda: {"data": [card]},
            "/pdlaunch/status": lambda: self.status,
            "/server_info": lambda: self.server_info,
            "/is_sleeping": self._told_of_sleep,
        }.items():
            app.router.add_get(path, answering(told))
        app.router.add_post("/sleep", self._sleep)
        app.router.add_post("/wake_up", self._wake_up)
        app.router.add_post("/v1/completions", self._complete)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    def _told_of_sleep(self) -> dict[str, bool] | None:
        return None if self.is_sleeping is None else {"is_sleeping": self.is_sleeping}

    async def _sleep(self, request: web.Request) -> web.Response:
        if self.is_sleeping is None:
            raise web.HTTPNotFound
        assert dict(request.query) == {"mode": "wait"}  # at level 1, vLLM's default
        assert not self.num_running
        assert not self.lends
        self.is_sleeping = True
        return web.json_response({"status": "sleeping", "level": 1})

    async def _wake_up(self, request: web.Request) -> web.Response:
        self.is_sleeping = request.query.getall("tags", []) == ["weights"]
        status = "sleeping" if self.is_sleeping else "awake"
        return web.json_response({"status": status, "tags": None})

    async def _metrics(self, _: web.Request) -> web.Response:
        self.num_looks += 1
        values = {
            "num_requests_running": self.num_running,
            "kv_cache_usage_perc": self.lends,
            "generation_tokens_total": self.num_tokens,
            "prompt_tokens_total": self.prompt_tokens,
            "request_generation_tokens_count": 0,
            "request_generation_tokens_sum": 0,
            "nixl_num_kv_expired_reqs_total": self.num_expired,
            "nixl_num_failed_transfers_total": self.num_failed_reads,
            "nixl_bytes_transferred_count": 1,
            "nixl_bytes_transferred_sum": self.num_bytes,
            "nixl_xfer_time_seconds_sum": self.seconds_read,
            "nixl_num_descriptors_sum": self.num_pieces,
        }
        page = "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in values.items())
        page += (
            f'vllm:cache_config_info{{block_size="{BLOCK_SIZE}",num_gpu_blocks="40",'
            f'cache_dtype="{self.cache_dtype}",engine="0"}} 1\n'
        )
        page += "".join(
            f'vllm:prompt_tokens_by_source_total{{engine="0",source="{source}"}} {number}\n'
            for source, number in self.tokens_by_source.items()
        )
        return web.Response(text=page)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert not self.is_sleeping, "vLLM would keep it until it is awake"
        self.bodies.append(body)
        prompt, params = body["prompt"], body.get("kv_transfer_params") or {}
        length = len(prompt)
        await self.moves.wait()
        if self.compute is not None:
            await self.compute()
        if params and self.go is not None:
            await self.go.wait()
        answer: dict[str, Any] = {"id": "cmpl-1", "model": body["model"]}
        if params.get("do_remote_decode") and self.has_connector:
            request_id = f"{self.name}-{len(self.bodies)}"
            self.shares[request_id] = prompt
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "remote_request_id": request_id,
                "remote_engine_id": self.name,
                "remote_host": self.side_channel[0],
                "remote_port": self.side_channel[1],
                "remote_prefill_cached_tokens": 0,
                "tp_size": 2,
                "pp_size": 1,
            }
        cached = 0
        self.num_bytes += self.num_bytes_of_others
        if params.get("do_remote_prefill") and self.moves_bytes:
            cached = length - 1
            prompt = self.shares.pop(params["remote_request_id"])
            self.num_bytes += BYTES_OF_TOKEN * len(prompt)
            if self.garbles:
                prompt = [0, *prompt[1:]]
        tokens = answer_of(prompt, body["max_tokens"])
        self.num_tokens += len(tokens)
        usage: dict[str, Any] = {"prompt_tokens": length, "completion_tokens": len(tokens)}
        if self.tokens_by_source:
            self.tokens_by_source["external_kv_transfer"] += cached
            self.tokens_by_source["local_compute"] += length - cached
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if body.get("stream"):
            return await self._stream(request, answer, tokens, usage)
        choice = {
            "index": 0,
            "text": "".join(f"<{token}>" for token in tokens),
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [-1.0 + self.logprob_error] * len(tokens)},
            "finish_reason": "length",
        }
        answer |= {"choices": [choice], "usage": usage}
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _stream(
        self, request: web.Request, answer: dict[str, Any], tokens: list[int], usage: dict[str, Any]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunks = [
            {
                "index": 0,
                "text": f"<{token}>",
                "token_ids": [token],
                "finish_reason": "length" if index == len(tokens) - 1 else None,
            }
            for index, token in enumerate(tokens)
        ]
        events = [answer | {"choices": [chunk]} for chunk in chunks]
        for event in (*events, answer | {"choices": [], "usage": usage}):
            await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def answering(told: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Answer with what is told as JSON; None: there is no such route."""

    async def answer(_: web.Request) -> web.Response:
        if (value := told()) is None:
            raise web.HTTPNotFound
        return web.json_response(value)

    return answer


async def listen(engine: FakeVllm, path: Path) -> web.AppRunner:
    """Listen on a Unix socket; the runner's ``cleanup`` ends it."""
    runner = web.AppRunner(engine.app())
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    return runner
