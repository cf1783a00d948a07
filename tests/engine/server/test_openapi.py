"""/openapi.json of an engine says what its routes really take and answer; /version and /ping."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from pdlaunch import __version__
from pdlaunch.engine.server import engine_service
from tests.engine.server.conftest import Engine
from tests.http.json_schema import misfits

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


async def document_of(engine: Engine) -> dict[str, Any]:
    async with engine.session.get(engine.url + "/openapi.json") as response:
        assert response.status == 200
        return await response.json()


def request_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def answer_schema(document: dict[str, Any], path: str, method: str, kind: str) -> dict[str, Any]:
    return document["paths"][path][method]["responses"]["200"]["content"][kind]["schema"]


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
    assert {"/v1/completions", CHAT, "/tokenize", "/v1/models/{name}", "/ping"} < set(
        document["paths"]
    )


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 2, "logprobs": 1, "n": 2}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "stop": "x", "echo": None}),
    (CHAT, {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": HELLO, "max_tokens": 2, "return_token_ids": True, "metadata": {"a": 1}}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": HELLO, "model": None}),
    ("/detokenize", {"tokens": [5]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_requests_and_answers_are_as_described(
    engine: Engine, path: str, body: dict[str, Any]
) -> None:
    document = await document_of(engine)
    assert misfits(body, request_schema(document, path), document) == []
    status, answer, _ = await engine.post(path, body)
    assert status == 200
    schema = answer_schema(document, path, "post", "application/json")
    assert misfits(answer, schema, document) == []
    if path.startswith("/v1"):
        schema = answer_schema(document, path, "post", "text/event-stream")
        options = {"include_usage": True, "continuous_usage_stats": True}
        for chunk in (await engine.stream(path, **body, stream_options=options))[:-1]:
            assert misfits(chunk, schema, document) == []


async def test_what_is_refused_is_not_described_as_allowed(engine: Engine) -> None:
    document = await document_of(engine)
    refused = [
        {"prompt": "x", "echo": True},
        {"prompt": 5},
        {"max_tokens": 2},
        {"prompt": "x", "temperature": "hot"},
        {"prompt": "x", "response_format": {"type": "json_object"}},
    ]
    for body in refused:
        assert misfits(body, request_schema(document, "/v1/completions"), document) != []
        status, error, _ = await engine.post("/v1/completions", body)
        assert status == 400
        assert misfits(error, document["components"]["schemas"]["Error"], document) == []


async def test_unknown_fields_are_described_as_what_becomes_of_them(make_engine) -> None:
    for strict in (False, True):
        engine = await make_engine(strict_fields=strict)
        document = await document_of(engine)
        for name in ("CompletionRequest", "ChatMessage"):
            assert document["components"]["schemas"][name]["additionalProperties"] is not strict


async def test_it_needs_the_key_where_it_says_so(engine: Engine) -> None:
    document = await document_of(engine)
    async with aiohttp.ClientSession() as stranger:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                url = engine.url + path.replace("{name}", "tiny")
                async with stranger.request(method, url) as response:
                    assert (response.status == 401) == ("security" in operation), path
    assert "security" not in document["paths"]["/ping"]["get"]


async def test_version_and_ping(engine: Engine) -> None:
    async with engine.session.get(engine.url + "/version") as response:
        assert await response.json() == {"version": __version__}
    for method in ("get", "post"):
        async with engine.session.request(method, engine.url + "/ping") as response:
            assert response.status == 200
    engine.service.loaded = None
    async with engine.session.get(engine.url + "/ping") as response:
        assert response.status == 503


async def test_all_references_are_there(engine: Engine) -> None:
    document = await document_of(engine)
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
