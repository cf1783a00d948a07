"""What engines answer, and what is said of answers in another form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import MAX_PAGE_BYTES
from pdlaunch.http.watch.engine_api import EngineApi, with_version
from pdlaunch.launch.engines.plan import capabilities_over_http

LENGTH = 60_000


class Engine:
    """Answers every question with the same body; ``api`` asks it."""

    body = b""

    def __init__(self, path: Path) -> None:
        self.api = EngineApi(f"unix:{path}")
        self.asks = (self.api.models, self.api.version, self.api.listed_engines)

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self.body)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine(tmp_path / "engine.sock")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    yield engine
    await engine.api.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    "body",
    [
        b"\xff" * LENGTH,
        b"a" * LENGTH,
        b"# TYPE a gauge\na{" + b"x" * LENGTH,
        b"[" * LENGTH,
        b'{"a": ' * (LENGTH // 6),
        b'{"is_sleeping": "\xff"}',
    ],
)
async def test_what_is_wrong_with_an_answer_is_told_in_few_words(
    engine: Engine, body: bytes
) -> None:
    engine.body = body
    for ask in (*engine.asks, engine.api.counts, partial(engine.api.complete, {})):
        with pytest.raises(ProtocolError) as caught:
            await ask(10.0)
        # It is logged, and shown to clients as the reason why an engine is not used.
        assert len(str(caught.value)) < 300
    assert await engine.api.server_info(10.0) is None
    assert await engine.api.is_sleeping(10.0) is None


async def test_an_engine_cannot_hold_up_who_asks_it_by_a_long_answer(engine: Engine) -> None:
    """All of an answer is parsed in the event loop, where nothing else happens meanwhile."""
    api = engine.api
    # A comment alone, which takes no time to parse.
    engine.body = b"a 3\n#".ljust(MAX_PAGE_BYTES, b"-")
    assert (await api.counts(60.0)).total("a") == 3
    engine.body += b"-"
    for ask in (*engine.asks, api.counts, partial(api.complete, {})):
        with pytest.raises(ProtocolError, match=r"its answer has more than \d+ bytes"):
            await ask(60.0)
    assert await api.is_healthy(60.0) is None
    assert await api.server_info(60.0) is None
    assert await api.is_sleeping(60.0) is None


@pytest.mark.parametrize(
    ("version", "continues"),
    [
        ("0.10.2", False),
        ("0.11.0rc1+cpu", True),
        ("0.32.0+cpu", True),
        ("1.0", True),
        ("dev", False),
        ("", False),
    ],
)
def test_streams_of_vllm_go_on_where_token_ids_are_told(version: str, continues: bool) -> None:
    known = with_version(capabilities_over_http("vllm"), version)
    assert (known.version, known.continues, known.goes_on) == (version, continues, continues)
    native = with_version(capabilities_over_http("native"), version)
    assert (native.continues, native.goes_on) == (False, True)
