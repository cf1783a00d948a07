"""/openapi.json, /version and /ping of the router."""

from __future__ import annotations

from typing import Any

import msgspec

from pdlaunch import __version__
from tests.http.json_schema import misfits
from tests.router.conftest import SPEC, Stand, pair
from tests.router.test_life_of_a_request import completion

PATH = "/v1/completions"


async def fetch(stand: Stand, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    async with stand.session.get(path, headers=headers) as response:
        return response.status, await response.json()


async def test_answers_are_as_described(stand: Stand) -> None:
    await stand.start(pair())
    _, document = await fetch(stand, "/openapi.json")
    post = document["paths"][PATH]["post"]
    contents = post["responses"]["200"]["content"]
    body = completion(return_token_ids=True)
    assert (
        misfits(body, post["requestBody"]["content"]["application/json"]["schema"], document) == []
    )
    whole = (await stand.post(body)).json()
    assert misfits(whole, contents["application/json"]["schema"], document) == []
    for event in (await stand.post(body | {"stream": True})).events():
        assert misfits(event, contents["text/event-stream"]["schema"], document) == []
    for path in ("/v1/models", "/v1/models/tiny"):
        schema = document["paths"][path.replace("tiny", "{name}")]["get"]["responses"]["200"]
        _, answer = await fetch(stand, path)
        assert misfits(answer, schema["content"]["application/json"]["schema"], document) == []


async def test_what_only_routers_may_send_is_not_described(stand: Stand) -> None:
    await stand.start(pair())
    _, document = await fetch(stand, "/openapi.json")
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        assert not {"kv_transfer_params", "resume"} & set(schemas[name]["properties"])
    commands = document["paths"]["/sleep"]["post"]["summary"]
    assert "admin key" in commands


async def test_they_are_guarded_as_their_neighbours(stand: Stand) -> None:
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, api_key="secret"))
    key = {"Authorization": "Bearer secret"}
    for path in ("/openapi.json", "/version"):
        assert (await fetch(stand, path))[0] == 401
        assert (await fetch(stand, path, **key))[0] == 200
        assert (await fetch(stand, path, **key, Host="evil.example"))[0] == 421
        assert (await fetch(stand, path, **key, Origin="http://evil.example"))[0] == 403
    assert await fetch(stand, "/version", **key) == (200, {"version": __version__})
    assert await fetch(stand, "/ping", Host="probe.example") == await fetch(stand, "/health")
    _, document = await fetch(stand, "/openapi.json", **key)
    assert document["paths"]["/version"]["get"]["security"]
    assert "security" not in document["paths"]["/ping"]["get"]
