"""Who gets into a launch's sockets: real sockets, real keys."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from pdlaunch.protocol.certificates import server_context
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.wire import MAX_FRAME_BYTES

REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
KEYS = new_launch_keys()
TIMEOUT_MS = 10_000


class Launch:
    """A socket that listens, and those that connect to it, which ``stack`` closes."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._secure = SecureContext(KEYS)
        stack.callback(self._secure.close)
        socket, self.endpoint = self._secure.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        socket.rcvtimeo = TIMEOUT_MS
        self.listener = self.closes(socket)

    def closes(self, socket: Any) -> Any:
        return self._stack.enter_context(socket)

    def friend(self, name: bytes) -> Any:
        return self.closes(self._secure.connect(zmq.DEALER, self.endpoint, identity=name))


@pytest.fixture
def launch() -> Iterator[Launch]:
    with ExitStack() as stack:
        yield Launch(stack)


# CURVE alone would let the fresh key in: it knows the server's public key and has a valid key pair
# of its own.
@pytest.mark.parametrize("kind", ["fresh key", "no CURVE", "PLAIN", "another server key"])
def test_strangers_get_nowhere(launch: Launch, kind: str) -> None:
    listener = launch.listener
    monitor = launch.closes(listener.get_monitor_socket(REFUSED | zmq.EVENT_DISCONNECTED))
    stranger = launch.closes(launch.closes(zmq.Context()).socket(zmq.DEALER))
    stranger.linger = 0
    if kind == "PLAIN":
        stranger.plain_username, stranger.plain_password = b"user", b"password"
    elif kind != "no CURVE":
        server_key = KEYS.public.encode() if kind == "fresh key" else zmq.curve_keypair()[0]
        stranger.curve_serverkey = server_key
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.connect(launch.endpoint)
    # A stranger that is refused before it sends has no connection left, and would wait for one.
    with suppress(zmq.Again):
        stranger.send(b"let me in", zmq.NOBLOCK)
    assert monitor.poll(TIMEOUT_MS), "the stranger was not refused"
    launch.friend(b"friend").send(b"hello")
    # The friend came last, and is the only one that is heard.
    assert listener.recv_multipart() == [b"friend", b"hello"]
    assert not listener.poll(100)
    listener.disable_monitor()


def test_a_frame_over_the_limit_closes_its_connection_and_no_other(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame of the true limit would be there several times over."""
    monkeypatch.setattr("pdlaunch.protocol.sockets.MAX_FRAME_BYTES", MAX_FRAME_BYTES // 64)
    socket, endpoint = launch._secure.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
    socket.rcvtimeo = TIMEOUT_MS
    launch.listener, launch.endpoint = launch.closes(socket), endpoint
    friend, greedy = launch.friend(b"friend"), launch.friend(b"greedy")
    friend.send(b"before")
    assert launch.listener.recv_multipart() == [b"friend", b"before"]
    monitor = launch.closes(greedy.get_monitor_socket(zmq.EVENT_DISCONNECTED))
    greedy.send(b"x" * (MAX_FRAME_BYTES // 64 + 1), copy=False)
    assert monitor.poll(TIMEOUT_MS)
    friend.send(b"after")
    assert launch.listener.recv_multipart() == [b"friend", b"after"]
    greedy.disable_monitor()


def test_keys_do_not_show_and_leave_no_file() -> None:
    keys = new_launch_keys(with_certificate=True)
    assert keys.certificate is not None
    before = set(Path("/proc/self/fd").iterdir())
    server_context(keys.certificate)
    assert set(Path("/proc/self/fd").iterdir()) <= before
    for secret in (keys.secret, keys.http_token, "PRIVATE"):
        assert secret not in repr(keys)
