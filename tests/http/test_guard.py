"""Host, Origin, content type and key at the door, as browsers and others send them."""

import asyncio
import socket
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from pdlaunch.errors import RequestError
from pdlaunch.http.app import Guard

HERE = "127.0.0.1"


def request(
    method: str = "GET",
    path: str = "/v1/models",
    headers: list[tuple[str, str]] | None = None,
    *,
    body: bool = False,
    host: str | None = "localhost",
    address: str = HERE,
) -> web.Request:
    sent = CIMultiDict(headers or [])
    if host is not None:
        sent.add("Host", host)
    transport = Mock()
    transport.get_extra_info.return_value = (address, 8000)
    payload = {"payload": asyncio.StreamReader()} if body else {}
    return make_mocked_request(method, path, sent, transport=transport, **payload)  # type: ignore[arg-type]


def status(guard: Guard, http: web.Request, names: str = "") -> int:
    """What the guard answers, 200 if it lets the request pass; ``names``: the setting to change."""
    try:
        guard.check(http)
    except RequestError as error:
        return error.status if names in str(error) else 0
    return 200


@pytest.mark.parametrize(
    ("guard", "host", "expected"),
    [
        *(
            (Guard("here.example"), host, 200)
            for host in (
                *("localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1:8000", "127.8.8.8"),
                *("[::1]:8000", "here.example:1"),
            )
        ),
        *(
            (Guard(HERE), host, 421)
            for host in (
                *("evil.example:8000", "localhost.evil.example", "evil@localhost", "localhost/"),
                *("127.0.0.1:x", "[::1", "10.0.0.1", "", " "),
            )
        ),
        (Guard(HERE, allowed_hosts=("LLM.example.com",)), "llm.Example.com:443", 200),
        (Guard(HERE, allowed_hosts=("fd00::7",)), "[fd00::7]:443", 200),
        (Guard(HERE, allowed_hosts=("llm.example.com",)), "example.com", 421),
        (Guard(HERE, allowed_hosts=("*",)), "example.com", 200),
        (Guard("0.0.0.0"), f"{socket.gethostname()}:8000", 200),
        (Guard("::"), "other.example", 421),
    ],
)
async def test_a_host_is_this_server_or_a_name_of_the_setting(
    guard: Guard, host: str, expected: int
) -> None:
    assert status(guard, request(host=host), "allowed_hosts") == expected
    assert status(guard, request(path="/health", host=host)) == 200


async def test_the_address_of_the_connection_is_a_host_of_this_server() -> None:
    assert status(Guard("0.0.0.0"), request(host="10.0.0.1:80", address="10.0.0.1")) == 200
    assert status(Guard("0.0.0.0"), request(host="10.0.0.2:80", address="10.0.0.1")) == 421


async def test_two_hosts_are_none() -> None:
    twice = [("Host", "localhost"), ("Host", "evil.example")]
    assert status(Guard(HERE), request(headers=twice, host=None)) == 421


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "", "http://localhost:8001", "https://localhost"),
        *("http://[", "localhost:8000"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
async def test_pages_of_other_origins_are_refused(origin: str, path: str) -> None:
    http = request("POST", path, [("Origin", origin)], host="localhost:8000")
    assert status(Guard(HERE), http, "use a proxy") == 403


async def test_its_own_page_is_let_in() -> None:
    http = request("POST", headers=[("Origin", "http://localhost:8000")], host="LOCALHOST:8000")
    assert status(Guard(HERE), http) == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": 'application/json; a="b"', "Content-Encoding": "identity"}, 200),
        ({}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "json"}, 415),
        ({"Content-Type": "*/*"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": ""}, 415),
    ],
)
async def test_a_body_is_plain_json(headers: dict[str, str], expected: int) -> None:
    sent = list(headers.items())
    assert status(Guard(HERE), request("POST", headers=sent, body=True)) == expected
    assert status(Guard(HERE), request("POST", "/sleep")) == 200
