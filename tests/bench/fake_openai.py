"""Streams made-up completions as a deployment does, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.http.headers import ROUTE_HEADER

Body = dict[str, Any]


def event(**content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


@contextmanager
def in_thread(*starts: Coroutine[Any, Any, web.AppRunner]) -> Iterator[None]:
    """Run servers in a thread, for callers that run an event loop of their own."""
    loop = asyncio.new_event_loop()
    runners = [loop.run_until_complete(start) for start in starts]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for runner in runners:
            loop.run_until_complete(runner.cleanup())
        loop.close()


class FakeOpenAI:
    """Knobs: ``refusals`` answers the next requests with (status, body); ``refuses_after`` so many
    requests it is full; ``max_model_len``; ``broken`` replaces the events of a stream;
    ``route`` is the header of that name; ``hold`` keeps answers back, ``asked`` is set when one
    was asked for.
    """

    def __init__(self) -> None:
        self.max_model_len: int | None = 4096
        self.prompts: list[list[int]] = []
        self.refusals: list[tuple[int, bytes]] = []
        self.refuses_after: int | None = None
        self.refusal = "full"
        self.broken: bytes | None = None
        self.models: Any = None
        self.hold = False
        self.route = ""
        self.asked = threading.Event()
        self.num_open = self.most_open = 0
        self.url = ""

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    @contextmanager
    def in_thread(self) -> Iterator[FakeOpenAI]:
        with in_thread(self.start()):
            yield self

    def answer_to(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return [(sum(prompt) + index) % 1000 for index in range(num_tokens)]

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": "made-up", "max_model_len": self.max_model_len}
        return web.json_response({"data": [card]} if self.models is None else self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(body["prompt"])
        if self.refusals:
            status, text = self.refusals.pop(0)
            return web.Response(status=status, body=text)
        if self.refuses_after is not None and len(self.prompts) > self.refuses_after:
            return web.json_response({"error": {"message": self.refusal}}, status=429)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self._stream(request, body)
        finally:
            self.num_open -= 1

    async def _stream(self, request: web.Request, body: Body) -> web.StreamResponse:
        response = web.StreamResponse(headers={ROUTE_HEADER: self.route} if self.route else None)
        await response.prepare(request)
        self.asked.set()
        if self.hold:
            await asyncio.Event().wait()
        if self.broken is not None:
            await response.write(self.broken)
            return response
        for token_id in self.answer_to(body["prompt"], body["max_tokens"]):
            choice: Body = {"index": 0, "text": "x"}
            if body.get("return_token_ids"):
                choice["token_ids"] = [token_id]
            await response.write(event(choices=[choice], usage=None))
            await asyncio.sleep(0)
        usage = {
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": len(body["prompt"]) // 2},
        }
        await response.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")
        return response
