"""What engines answer, and what is said of answers in another form."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.watch.engine_api import EngineApi

LENGTH = 100_000


@pytest.mark.parametrize(
    "body", [b"\xff" * LENGTH, b"a" * LENGTH, b"# TYPE a gauge\na{" + b"x" * LENGTH]
)
async def test_what_is_wrong_with_an_answer_is_told_in_few_words(
    tmp_path: Path, body: bytes
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    api = EngineApi(f"unix:{tmp_path / 'engine.sock'}")
    try:
        for ask in (api.counts, api.models, api.version, api.listed_engines):
            with pytest.raises(ProtocolError) as caught:
                await ask(10.0)
            # It is logged, and shown to clients as the reason why an engine is not used.
            assert len(str(caught.value)) < 300
    finally:
        await api.close()
        await runner.cleanup()
