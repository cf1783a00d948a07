"""An HTTP server of a test, in a thread of its own."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from tests.bench.fake_openai import in_thread


@contextmanager
def web_server(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Iterator[str]:
    """Answer all requests at a free port of 127.0.0.1; yield the URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def start() -> web.AppRunner:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    with in_thread(start()):
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
