"""/openapi.json of an engine describes its routes and what they answer; /version and /ping."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdlaunch import __version__
from pdlaunch.engine.server import engine_service
from tests.engine.server.conftest import Engine
from tests.http.json_schema import misfits

CHAT = "/v1/chat/completions"
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 2, "logprobs": 1, "n": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "logprobs": True}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/detokenize", {"tokens": [5]}),
]


async def document_of(engine: Engine) -> dict[str, Any]:
    async with engine.session.get(engine.url + "/openapi.json") as response:
        assert response.status == 200
        return await response.json()


async def test_every_route_is_described_and_every_described_one_is_there(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_service, "WAIT_FOR_SPANS_S", 0.0)
    document = await document_of(engine)
    for path, operations in document["paths"].items():
        assert all(operation["summary"] for operation in operations.values())
        for method in ("get", "post"):
            url = engine.url + path.replace("{name}", "other")
            async with engine.session.request(method, url) as response:
                assert (response.status == 405) == (method not in operations), (method, path)
    named = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert named <= set(document["components"]["schemas"])


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_requests_and_answers_are_as_described(
    engine: Engine, path: str, body: dict[str, Any]
) -> None:
    document = await document_of(engine)
    post = document["paths"][path]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert misfits(body, schema, document) == []
    status, answer, _ = await engine.post(path, body)
    assert status == 200
    content = post["responses"]["200"]["content"]
    assert misfits(answer, content["application/json"]["schema"], document) == []
    if path.startswith("/v1"):
        options = {"include_usage": True, "continuous_usage_stats": True}
        for chunk in (await engine.stream(path, **body, stream_options=options))[:-1]:
            assert misfits(chunk, content["text/event-stream"]["schema"], document) == []


async def test_version_and_ping(engine: Engine) -> None:
    async with engine.session.get(engine.url + "/version") as response:
        assert await response.json() == {"version": __version__}
    for method in ("get", "post"):
        async with engine.session.request(method, engine.url + "/ping") as response:
            assert response.status == 200
    engine.service.loaded = None
    async with engine.session.get(engine.url + "/ping") as response:
        assert response.status == 503
