"""The door of an HTTP process: ids, keys and errors of every route."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from pdlaunch import __version__
from pdlaunch.errors import KillsEngineError, OverloadedError
from pdlaunch.http.app import AppRoute, Guard, HttpApp, bearer_check, model_routes, request_id_of
from pdlaunch.http.connections import HttpRunner
from pdlaunch.http.errors import STARTING, RelayedError, json_response
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.openai.responses import ModelCard

Ask = Callable[..., Awaitable[tuple[int, dict, aiohttp.ClientResponse]]]
KEY = {"Authorization": "Bearer key"}
ERRORS = {
    "/busy": OverloadedError("full", retry_after_s=3),
    "/deadly": KillsEngineError("crashed twice"),
    "/broken": ZeroDivisionError("secret"),
    "/starting": OverloadedError("the deployment is starting", status=503, code=STARTING),
    "/relayed": RelayedError("engine e answered 418", 418, b'{"a": 1}', {"retry-after": "9"}),
}


async def answer(http: web.Request) -> web.StreamResponse:
    if (error := ERRORS.get(http.path)) is not None:
        raise error
    return json_response({"id": request_id_of(http)})


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def ask(registry: CollectorRegistry) -> AsyncIterator[Ask]:
    other = bearer_check(["other"], message="wrong other key", code="no_other_key")
    app = HttpApp(
        [
            AppRoute("GET", "/open", answer),
            AppRoute("POST", "/closed", answer),
            AppRoute("GET", "/other", answer, check_key=other),
            *(AppRoute("GET", path, answer) for path in ERRORS),
            *model_routes(lambda: [ModelCard(id="org/tiny")]),
        ],
        guard=Guard("127.0.0.1"),
        check_key=bearer_check(["key"], message="wrong key", code="no_key"),
        metrics=RequestMetrics(registry, {"model_name": "tiny"}),
        max_body_bytes=1000,
        open_paths=("/open",),
    ).app
    runner = HttpRunner(app, max_connections=10, shutdown_timeout_s=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:

        async def send(
            method: str, path: str, **headers: str
        ) -> tuple[int, dict, aiohttp.ClientResponse]:
            async with session.request(method, path, headers=headers) as response:
                return response.status, await response.json() if method != "HEAD" else {}, response

        yield send
    await runner.cleanup()


async def test_every_answer_has_the_requests_id(ask: Ask) -> None:
    status, body, response = await ask("GET", "/open", **{"X-Request-Id": "mine"})
    assert (status, body["id"], response.headers["X-Request-Id"]) == (200, "mine", "mine")
    _, body, response = await ask("GET", "/open")
    assert body["id"] == response.headers["X-Request-Id"]
    status, body, response = await ask("GET", "/open", **{"X-Request-Id": "a b"})
    assert (status, body["error"]["param"]) == (400, "X-Request-Id")
    assert response.headers["X-Request-Id"] != "a b"


@pytest.mark.parametrize(
    ("method", "path", "key", "expected"),
    [
        ("HEAD", "/open", "", 200),
        ("POST", "/closed", "", "no_key"),
        ("POST", "/closed", "key", 200),
        ("GET", "/other", "key", "no_other_key"),
        ("GET", "/other", "other", 200),
        ("GET", "/nothing", "", "no_key"),
        ("GET", "/nothing", "key", "not_found"),
        ("GET", "/version", "", "no_key"),
        ("DELETE", "/closed", "key", "method_not_allowed"),
        ("GET", "/v1/models/other", "key", "model_not_found"),
    ],
)
async def test_each_route_asks_for_its_key_before_anything_else(
    ask: Ask, method: str, path: str, key: str, expected: int | str
) -> None:
    status, body, response = await ask(method, path, Authorization=f"Bearer {key}")
    assert (body["error"]["code"] if "error" in body else status) == expected
    if status == 405:
        assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize("line", ["OPTIONS *", "CONNECT 127.0.0.1:1", "GET http://127.0.0.1"])
async def test_what_has_no_path_is_an_error_like_others(ask: Ask, line: str) -> None:
    _, _, known = await ask("GET", "/open")
    for key, status, code in (
        ("", b"401", "no_key"),
        ("Authorization: Bearer key\r\n", b"404", "not_found"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", known.url.port)
        fields = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{line} HTTP/1.1\r\n{fields}{key}\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.split()[1] == status
        assert json.loads(body)["error"]["code"] == code


async def test_errors_become_answers_and_are_counted(ask: Ask, registry: CollectorRegistry) -> None:
    status, body, response = await ask("GET", "/busy", **KEY)
    assert (status, response.headers["Retry-After"]) == (429, "3")
    status, body, response = await ask("GET", "/deadly", **KEY)
    assert (status, response.headers["X-Should-Retry"]) == (500, "false")
    status, body, response = await ask("GET", "/broken", **KEY)
    assert (status, "secret" in str(body)) == (500, False)
    status, body, response = await ask("GET", "/relayed", **KEY)
    assert (status, body, response.headers["Retry-After"]) == (418, {"a": 1}, "9")
    for failed, number in ((429, 1), (500, 2), (418, 1)):
        labels = {"model_name": "tiny", "status": str(failed)}
        assert registry.get_sample_value("pdlaunch_request_errors_total", labels) == number


async def test_unknown_paths_and_polls_before_the_start_are_no_errors(
    ask: Ask, registry: CollectorRegistry
) -> None:
    assert (await ask("GET", "/starting", **KEY))[0] == 503
    assert (await ask("POST", "/v2/embeddings", **KEY))[0] == 404
    assert (await ask("DELETE", "/closed", **KEY))[0] == 405
    page = generate_latest(registry).decode()
    counts = re.findall(r"^pdlaunch_request_errors_total.* (\S+)$", page, re.MULTILINE)
    assert set(counts) == {"0.0"}


async def test_models_are_found_by_names_with_slashes_and_the_version_is_told(ask: Ask) -> None:
    assert (await ask("GET", "/v1/models", **KEY))[1]["data"][0]["id"] == "org/tiny"
    assert (await ask("GET", "/v1/models/org/tiny", **KEY))[1]["id"] == "org/tiny"
    assert (await ask("GET", "/version", **KEY))[1] == {"version": __version__}
