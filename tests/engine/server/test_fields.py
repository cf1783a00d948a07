"""Unknown fields, histories with tools, and what else clients send to one engine."""

from __future__ import annotations

import io
import json

import aiohttp
import pytest

from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]
VLLM_ROUTERS = {
    "no_stop_trim": False,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
}


async def sent(engine: Engine, path: str, body: dict) -> aiohttp.ClientResponse:
    # A file: aiohttp warns of long bodies that are bytes.
    content = io.BytesIO(json.dumps(body).encode())
    async with engine.session.post(engine.url + path, data=content, headers=JSON) as response:
        await response.read()
        return response


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_unknown_fields_are_ignored_and_named_in_the_answer(
    engine: Engine, path: str, stream: bool
) -> None:
    body = {"max_tokens": 2, "stream": stream, "prompt": "hello", "messages": HELLO}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    plain = await sent(engine, path, body)
    assert (plain.status, IGNORED_FIELDS_HEADER in plain.headers) == (200, False)
    response = await sent(engine, path, body | VLLM_ROUTERS)
    assert response.status == 200
    assert response.headers[IGNORED_FIELDS_HEADER].split(", ") == list(VLLM_ROUTERS)


@pytest.mark.parametrize(("path", "field"), [("/tokenize", "prompt"), ("/detokenize", "tokens")])
async def test_texts_are_converted_in_spite_of_unknown_fields(
    engine: Engine, path: str, field: str
) -> None:
    body = {field: "hello" if field == "prompt" else [5], "nonsense": 1}
    response = await sent(engine, path, body)
    assert (response.status, response.headers[IGNORED_FIELDS_HEADER]) == (200, "nonsense")


async def test_strict_fields_refuse_them(make_engine, rank: FakeRank) -> None:
    engine = await make_engine(strict_fields=True)
    for path, body in [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ]:
        status, answer, _ = await engine.post(path, body | {"nonsense": 1})
        assert (status, answer["error"]["param"]) == (400, "nonsense")
        assert (await sent(engine, path, body)).status == 200


async def test_a_hostile_name_cannot_add_a_header_or_a_log_line(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["x\r\nX-Evil: 1", "\n2026 ERROR forged", "é" * 10, "x" * 2**20]
    response = await sent(engine, "/v1/completions", {"prompt": "x"} | dict.fromkeys(names, 1))
    assert response.status == 200
    assert not {"X-Evil", IGNORED_FIELDS_HEADER} & set(response.headers)
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) == len(names)
    assert all(line.isprintable() and len(line) < 400 for line in lines)


# As templates of Qwen and SmolLM3 show tools and calls.
