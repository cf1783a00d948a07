"""Host, Origin and content type at the door, as browsers and others send them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import has_bearer
from pdlaunch.http.errors import error_body
from pdlaunch.http.guard import Guard

Send = Callable[..., Awaitable[aiohttp.ClientResponse]]
PORT = 8000
"""In headers; the servers of these tests have another one."""


async def serve(guard: Guard, runners: list[web.AppRunner]) -> str:
    @web.middleware
    async def check(
        http: web.Request, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.StreamResponse:
        try:
            return guard.admit(http) or await handler(http)
        except RequestError as error:
            return web.json_response(error_body(error), status=error.status)

    async def echo(http: web.Request) -> web.Response:
        return web.json_response(
            {"keys": [has_bearer(http, ["first", "second"]), has_bearer(http, [])]}
        )

    app = web.Application(middlewares=[check])
    app.on_response_prepare.append(guard.add_cors_headers)
    app.router.add_route("*", "/{path:.*}", echo)
    runner = web.AppRunner(app, access_log=None)
    runners.append(runner)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def make() -> AsyncIterator[Callable[[Guard], Awaitable[Send]]]:
    runners: list[web.AppRunner] = []
    async with aiohttp.ClientSession() as session:

        async def make(guard: Guard) -> Send:
            url = await serve(guard, runners)

            async def send(
                path: str = "/v1/models", method: str = "GET", **options: object
            ) -> aiohttp.ClientResponse:
                async with session.request(method, url + path, **options) as response:  # type: ignore[arg-type]
                    await response.read()
                    return response

            return send

        yield make
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    "host",
    [
        f"localhost:{PORT}",
        "LOCALHOST",
        "localhost.",
        f"127.0.0.1:{PORT}",
        "127.8.8.8",
        f"[::1]:{PORT}",
        "here.example:1",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
async def test_hosts_of_this_server(
    make: Callable[[Guard], Awaitable[Send]], host: str, path: str
) -> None:
    send = await make(Guard("here.example"))
    assert (await send(path, headers={"Host": host})).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "localhost.evil.example",
        "evil@localhost",
        "localhost/",
        "127.0.0.1:x",
        "[::1",
        "10.0.0.1",
        "",
        " ",
    ],
)
async def test_other_hosts_are_refused_and_the_setting_is_named(
    make: Callable[[Guard], Awaitable[Send]], host: str
) -> None:
    send = await make(Guard("127.0.0.1"))
    refused = await send(headers={"Host": host})
    assert refused.status == 421
    assert "allowed_hosts" in (await refused.json())["error"]["message"]
    assert (await send("/health", headers={"Host": host})).status == 200


async def test_allowed_hosts(make: Callable[[Guard], Awaitable[Send]]) -> None:
    send = await make(Guard("127.0.0.1", allowed_hosts=("LLM.example.com", "fd00::7")))
    assert (await send(headers={"Host": "llm.Example.com:443"})).status == 200
    assert (await send(headers={"Host": "[fd00::7]:443"})).status == 200
    assert (await send(headers={"Host": "example.com"})).status == 421
    send = await make(Guard("127.0.0.1", allowed_hosts=("*",)))
    assert (await send(headers={"Host": "example.com"})).status == 200


async def test_a_server_of_all_addresses_knows_this_machine(
    make: Callable[[Guard], Awaitable[Send]],
) -> None:
    name = socket.gethostname()
    assert (await (await make(Guard("0.0.0.0")))(headers={"Host": f"{name}:{PORT}"})).status == 200
    assert (await (await make(Guard("::")))(headers={"Host": "other.example"})).status == 421
    if name != "localhost":
        assert (await (await make(Guard("127.0.0.1")))(headers={"Host": name})).status == 421


async def test_pages_of_other_origins_are_refused(make: Callable[[Guard], Awaitable[Send]]) -> None:
    send = await make(Guard("127.0.0.1"))
    for origin in (
        "http://evil.example",
        "null",
        "",
        f"http://localhost:{PORT + 1}",
        "https://localhost",
        "http://[",
        "localhost:8000",
    ):
        for path in ("/v1/models", "/health"):
            refused = await send(
                path, "POST", headers={"Origin": origin, "Host": f"localhost:{PORT}"}
            )
            assert refused.status == 403, origin
            assert "cors_origins" in (await refused.json())["error"]["message"]
            assert not any(name.lower().startswith("access-control") for name in refused.headers)
    own = await send(
        "/sleep",
        "POST",
        headers={"Origin": f"http://localhost:{PORT}", "Host": f"LOCALHOST:{PORT}"},
    )
    assert own.status == 200


async def test_pages_of_listed_origins_get_what_browsers_ask_for(
    make: Callable[[Guard], Awaitable[Send]],
) -> None:
    page = "https://chat.example"
    send = await make(Guard("127.0.0.1", cors_origins=(f"{page}/",)))
    wanted = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = await send("/v1/completions", "OPTIONS", headers=wanted)
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == page
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert preflight.headers["Vary"] == "Origin"
    answer = await send("/v1/completions", "POST", json={}, headers={"Origin": page})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, page)
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
    without = await send("/v1/completions", "POST", json={})
    assert (without.status, without.headers["Vary"]) == (200, "Origin")
    assert "Access-Control-Allow-Origin" not in without.headers
    assert (
        await send(
            "/v1/completions", "OPTIONS", headers=wanted | {"Origin": "https://evil.example"}
        )
    ).status == 403
    every = await make(Guard("127.0.0.1", cors_origins=("*",)))
    assert (await every(headers={"Origin": "null"})).headers[
        "Access-Control-Allow-Origin"
    ] == "null"


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/json;charset=UTF-8",
        'application/json; a="b"',
    ],
)
async def test_json_is_taken(make: Callable[[Guard], Awaitable[Send]], content_type: str) -> None:
    send = await make(Guard("127.0.0.1"))
    assert (
        await send("/tokenize", "POST", data=b"{}", headers={"Content-Type": content_type})
    ).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain; application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "json",
        "*/*",
    ],
)
async def test_other_content_types_are_refused(
    make: Callable[[Guard], Awaitable[Send]], content_type: str | None
) -> None:
    send = await make(Guard("127.0.0.1"))
    headers = {} if content_type is None else {"Content-Type": content_type}
    skipped = ["Content-Type"]

    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}"

    for data in (b"{}", chunks()):
        refused = await send(
            "/tokenize", "POST", data=data, headers=headers, skip_auto_headers=skipped
        )
        assert refused.status == 415
        assert "application/json" in (await refused.json())["error"]["message"]
    assert (await send("/sleep", "POST", headers=headers, skip_auto_headers=skipped)).status == 200


@pytest.mark.parametrize(
    ("header", "has_one"),
    [
        ("Bearer first", True),
        ("bearer  second ", True),
        ("Bearer firs", False),
        ("Bearer first second", False),
        ("Basic first", False),
        ("first", False),
        ("Bearer ", False),
        ("Bearer \u00e9", False),
        (None, False),
    ],
)
async def test_bearer_keys(
    make: Callable[[Guard], Awaitable[Send]], header: str | None, has_one: bool
) -> None:
    send = await make(Guard("127.0.0.1"))
    answer = await send(headers={} if header is None else {"Authorization": header})
    assert (await answer.json())["keys"] == [has_one, False]
