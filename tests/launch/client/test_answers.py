"""Whatever a server answers that is no pdlaunch ends in one error that says so."""

from __future__ import annotations

import http.client
import socket
import time

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client import api as api_module
from pdlaunch.launch.client.api import Api
from tests.launch.client.conftest import answering, serving

OK, MISSING = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404 Not Found\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
PATIENCE_S = 30.0


def why_not(answer: bytes, *, repeated: bytes = b"", timeout_s: float = PATIENCE_S) -> str:
    """Return the error of a server that sends ``answer``, then ``repeated`` for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(answer)
        while repeated:
            connection.sendall(repeated)
            if len(repeated) == 1:
                time.sleep(0.01)

    with answering(send) as url:
        api = Api(url, timeout_s=timeout_s)
        with pytest.raises(PdlaunchError) as caught:
            api.get_object("/pdlaunch/status")
        return str(caught.value).removeprefix(f"{url}/pdlaunch/status ")


def with_length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("status", [OK, MISSING])
@pytest.mark.parametrize(
    ("head", "repeated"),
    [
        (b'\r\n{"a":"', b"x" * 65536),
        (b"Content-Length: 99999999999999999999999\r\n\r\n", b"x" * 65536),
        (CHUNKED, b"4000\r\n" + b"x" * 0x4000 + b"\r\n"),
        (CHUNKED + b"ffffffffffffffffffff\r\n", b"x" * 65536),
        (CHUNKED + b"-1\r\n", b"x" * 65536),
        (CHUNKED + b"0\r\n", b"trailer: x\r\n" * 1000),
    ],
)
def test_an_answer_without_end_is_read_up_to_the_limit(
    status: bytes, head: bytes, repeated: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "MAX_ANSWER_BYTES", 2 << 20)
    assert why_not(status + head, repeated=repeated) == "answers with more than 2 MiB"


@pytest.mark.parametrize("begun", [b"", OK, OK + b"\r\n", MISSING + b"\r\n", OK + CHUNKED])
def test_an_answer_that_comes_a_byte_at_a_time_has_one_deadline(begun: bytes) -> None:
    said = why_not(begun, repeated=b" ", timeout_s=0.3)
    assert said == "has not answered in full within 0.3 s"


@pytest.mark.parametrize("begun", [b"", OK, MISSING + b"Content-Length: 9\r\n\r\n{}"])
def test_an_answer_that_stalls_has_the_same_deadline(begun: bytes) -> None:
    def stall(connection: socket.socket) -> None:
        connection.sendall(begun)
        connection.recv(1)

    with answering(stall) as url, pytest.raises(PdlaunchError, match=r"in full within 0\.1 s"):
        Api(url, timeout_s=0.1).get("/health")


@pytest.mark.parametrize("status", [OK, MISSING])
@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 1000\r\n\r\n{}",
        CHUNKED + b"2\r\n{}\r\n",
        CHUNKED + b"9\r\n{}",
        CHUNKED + b"no number\r\n{}",
        CHUNKED + b"-5\r\n{}",
    ],
)
def test_an_answer_that_breaks_off_is_none(status: bytes, rest: bytes) -> None:
    assert why_not(status + rest) == "stopped in the middle of its answer"


@pytest.mark.parametrize("status", [OK, MISSING])
@pytest.mark.parametrize(
    ("body", "what_is_wrong"),
    [
        (b"[" * 200_000, "its JSON is nested too deeply"),
        (b'{"a":' * 200_000, "its JSON is nested too deeply"),
        (b"\xff\xff{}", "it is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is no JSON"),
        (b"<html>", "it is no JSON"),
        (b"", "it is no JSON"),
        (b"[]", "it is no JSON object"),
    ],
)
def test_a_body_of_another_form_is_told(status: bytes, body: bytes, what_is_wrong: str) -> None:
    number = int(status.split()[1])
    said = f"answers HTTP {number}, but not as a deployment of pdlaunch does: {what_is_wrong}"
    assert why_not(status + with_length(body)) == said


def test_text_that_is_no_utf_8_and_metrics_that_are_none_are_told() -> None:
    with answering(lambda connection: connection.sendall(OK + with_length(b"\xff 1\n"))) as url:
        api = Api(url, timeout_s=PATIENCE_S)
        for ask in (lambda: api.get("/metrics"), api.metrics, lambda: api.post_text("/x", {})):
            with pytest.raises(PdlaunchError, match="it is not in UTF-8"):
                ask()
    with (
        answering(lambda connection: connection.sendall(OK + with_length(b"<html>"))) as url,
        pytest.raises(PdlaunchError, match=r"/metrics answers HTTP 200.*: a line is no sample"),
    ):
        Api(url, timeout_s=PATIENCE_S).metrics()


@pytest.mark.parametrize(
    "answer",
    [
        OK + with_length(b'{"a": 1}'),
        OK + b'\r\n{"a": 1}',
        OK + CHUNKED + b'3\r\n{"a\r\n5\r\n": 1}\r\n0\r\nx: y\r\n\r\n',
    ],
)
def test_a_whole_answer_is_read_in_each_form(answer: bytes) -> None:
    with answering(lambda connection: connection.sendall(answer)) as url:
        assert Api(url, timeout_s=PATIENCE_S).get_object("/x") == (200, {"a": 1})


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\u20ac", "\0"])
def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(end: str) -> None:
    with pytest.raises(PdlaunchError, match=r"the key for .* holds a") as caught:
        Api("http://127.0.0.1:1", f"secret{end}").get("/x")
    assert "secret" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with serving() as (elsewhere, told), serving(elsewhere) as (url, keys):
        api = Api(url, "key-of-a-command", 10.0)
        assert api.get("/pdlaunch/status") == (302, "{}")
        assert api.post("/sleep", {})[0] == 302
        assert (len(keys), told) == (2, [])


def test_a_call_has_its_key_and_one_to_nobody_says_so() -> None:
    with serving() as (url, keys):
        assert Api(url, "mine", 10.0).get_object("/pdlaunch/status") == (200, {})
        assert keys == ["Bearer mine"]
    with pytest.raises(PdlaunchError, match="/pdlaunch/status cannot be reached"):
        Api(url, "mine", 10.0).get("/pdlaunch/status")


def test_an_ipv6_address_without_a_port_is_asked_at_that_of_its_scheme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(self: http.client.HTTPConnection) -> None:
        raise OSError(f"{self.host} {self.port}")

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    for scheme, port in (("http", 80), ("https", 443)):
        with pytest.raises(PdlaunchError, match=f"::1 {port}$"):
            Api(f"{scheme}://[::1]").get("/health")
