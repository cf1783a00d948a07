"""Which fields were ignored reaches the client through the router."""

from __future__ import annotations

import msgspec
import pytest

from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from tests.router.conftest import SPEC, Stand, pair
from tests.router.test_life_of_a_request import completion


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_what_engines_ignore_is_named_in_the_answer(
    stand: Stand, stream: bool, max_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    engines = pair()
    await stand.start(engines)
    body = completion(stream=stream, max_tokens=max_tokens)
    assert IGNORED_FIELDS_HEADER not in (await stand.post(body)).headers
    for engine in engines:
        engine.ignored_fields = "no_stop_trim, messages.x"
    for _ in range(2):
        answer = await stand.post(body | {"no_stop_trim": False})
        assert answer.status == 200
        assert answer.headers[IGNORED_FIELDS_HEADER] == "no_stop_trim, messages.x"
    assert all("no_stop_trim" in seen.body for engine in engines for seen in engine.seen[-1:])
    logged = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(logged) == 2


async def test_the_router_names_those_of_stream_options(stand: Stand) -> None:
    await stand.start(pair())
    options = {"include_usage": True, "include_obfuscation": False, "other": 1}
    answer = await stand.post(completion(stream=True, stream_options=options))
    assert (answer.status, answer.headers[IGNORED_FIELDS_HEADER]) == (200, "stream_options.other")
    assert answer.events()[-1]["usage"]["completion_tokens"]


async def test_strict_fields_refuse_those_of_stream_options(stand: Stand) -> None:
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, strict_fields=True))
    answer = await stand.post(completion(stream=True, stream_options={"include_usag": True}))
    assert (answer.status, answer.json()["error"]["param"]) == (400, "stream_options.include_usag")
