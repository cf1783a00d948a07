"""Whatever a server answers that is no pdlaunch ends in one error that says so."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client import api as api_module
from pdlaunch.launch.client.api import Api

OK, MISSING = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404 Not Found\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Yield the URL of a server that writes what ``answer`` sends, and then hangs up."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            # The other side may have enough.
            with suppress(OSError):
                answer(self.request)
                # To end with an unread body would reset the connection.
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(65536):
                    pass

    class Server(ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def why_not(answer: bytes, *, repeated: bytes = b"") -> str:
    def send(connection: socket.socket) -> None:
        connection.sendall(answer)
        while repeated:
            connection.sendall(repeated)

    with answering(send) as url:
        api = Api(url, timeout_s=30.0)
        with pytest.raises(PdlaunchError) as caught:
            api.get_object("/pdlaunch/status")
        return str(caught.value).removeprefix(f"{url}/pdlaunch/status ")


def with_length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("head", "repeated"),
    [
        (b'\r\n{"a":"', b"x" * 65536),
        (b"Content-Length: 99999999999999999999999\r\n\r\n", b"x" * 65536),
        (CHUNKED, b"4000\r\n" + b"x" * 0x4000 + b"\r\n"),
    ],
)
def test_an_answer_without_end_is_read_up_to_the_limit(
    head: bytes, repeated: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "MAX_ANSWER_BYTES", 2 << 20)
    assert why_not(OK + head, repeated=repeated) == "answers with more than 2 MiB"


def test_an_answer_that_stalls_is_given_up() -> None:
    def stall(connection: socket.socket) -> None:
        connection.sendall(OK)
        connection.recv(1)

    with answering(stall) as url, pytest.raises(PdlaunchError, match="reached: timed out"):
        Api(url, timeout_s=0.1).get("/health")


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
def test_an_answer_that_breaks_off_is_none(rest: bytes) -> None:
    assert "stopped in the middle" in (said := why_not(OK + rest)) or "cannot be reached" in said


@pytest.mark.parametrize("status", [OK, MISSING])
@pytest.mark.parametrize(
    ("body", "what_is_wrong"),
    [
        (b"[" * 200_000, "its JSON is nested too deeply"),
        (b"\xff\xff{}", "it is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is not JSON"),
        (b"<html>", "it is not JSON"),
        (b"[]", "it is not a JSON object"),
    ],
)
def test_a_body_of_another_form_is_told(status: bytes, body: bytes, what_is_wrong: str) -> None:
    number = int(status.split()[1])
    said = f"answers HTTP {number}, but not as a deployment of pdlaunch does: {what_is_wrong}"
    assert why_not(status + with_length(body)) == said


@pytest.mark.parametrize("end", ["\r", "\n", "\u20ac", "\0"])
def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(end: str) -> None:
    with pytest.raises(PdlaunchError, match=r"the key for .* holds a") as caught:
        Api("http://127.0.0.1:1", f"secret{end}").get("/x")
    assert "secret" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    came: list[socket.socket] = []
    with answering(came.append) as elsewhere:
        head = f"HTTP/1.1 302 Found\r\nLocation: {elsewhere}\r\n".encode() + with_length(b"{}")
        with answering(lambda connection: connection.sendall(head)) as url:
            api = Api(url, "key-of-a-command", 10.0)
            assert api.get("/pdlaunch/status") == (302, "{}")
            assert api.post("/sleep", {})[0] == 302
    assert not came
