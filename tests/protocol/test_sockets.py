"""Who gets into a launch's sockets: real sockets, real keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from pdlaunch.protocol.certificates import server_context
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from pdlaunch.protocol.wire import MAX_FRAME_BYTES

REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
TIMEOUT_MS = 10_000


@pytest.fixture
def keys() -> LaunchKeys:
    return new_launch_keys()


@pytest.fixture
def secure(keys: LaunchKeys) -> Iterator[SecureContext]:
    context = SecureContext(keys)
    yield context
    context.close()


@pytest.fixture
def plain() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(secure: SecureContext, sockets: ExitStack) -> tuple[Any, str]:
    socket, endpoint = secure.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
    socket.rcvtimeo = TIMEOUT_MS
    return sockets.enter_context(socket), endpoint


def use_curve(socket: Any, server_key: str, client: tuple[bytes, bytes]) -> None:
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey, socket.curve_secretkey = client


@pytest.mark.parametrize("kind", ["fresh key", "no CURVE", "PLAIN", "another server key"])
def test_strangers_get_nowhere(
    secure: SecureContext, plain: zmq.Context[Any], keys: LaunchKeys, sockets: ExitStack, kind: str
):
    listener, endpoint = listen(secure, sockets)
    monitor = sockets.enter_context(listener.get_monitor_socket(REFUSED | zmq.EVENT_DISCONNECTED))
    stranger = sockets.enter_context(plain.socket(zmq.DEALER))
    stranger.linger = 0
    if kind == "fresh key":
        # CURVE alone would let it in: it knows the server's public key and has a valid key pair of
        # its own.
        use_curve(stranger, keys.public, zmq.curve_keypair())
    elif kind == "PLAIN":
        stranger.plain_username, stranger.plain_password = b"user", b"password"
    elif kind == "another server key":
        use_curve(stranger, zmq.curve_keypair()[0].decode(), zmq.curve_keypair())
    stranger.connect(endpoint)
    # A stranger that is refused before it sends has no connection left, and would wait for one.
    with suppress(zmq.Again):
        stranger.send(b"let me in", zmq.NOBLOCK)
    assert monitor.poll(TIMEOUT_MS), "the stranger was not refused"
    friend = sockets.enter_context(secure.connect(zmq.DEALER, endpoint, identity=b"friend"))
    friend.send(b"hello")
    # The friend came last, and is the only one that is heard.
    assert listener.recv_multipart() == [b"friend", b"hello"]
    assert not listener.poll(100)
    listener.disable_monitor()


def test_a_frame_over_the_limit_closes_its_connection_and_no_other(
    secure: SecureContext, sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
):
    """A frame of the true limit would be there several times over."""
    monkeypatch.setattr("pdlaunch.protocol.sockets.MAX_FRAME_BYTES", MAX_FRAME_BYTES // 64)
    listener, endpoint = listen(secure, sockets)
    friend = sockets.enter_context(secure.connect(zmq.DEALER, endpoint, identity=b"friend"))
    friend.send(b"before")
    assert listener.recv_multipart() == [b"friend", b"before"]
    greedy = sockets.enter_context(secure.connect(zmq.DEALER, endpoint, identity=b"greedy"))
    monitor = sockets.enter_context(greedy.get_monitor_socket(zmq.EVENT_DISCONNECTED))
    greedy.send(b"x" * (MAX_FRAME_BYTES // 64 + 1), copy=False)
    assert monitor.poll(TIMEOUT_MS)
    friend.send(b"after")
    assert listener.recv_multipart() == [b"friend", b"after"]
    greedy.disable_monitor()


def test_keys_do_not_show_and_leave_no_file() -> None:
    keys = new_launch_keys(with_certificate=True)
    assert keys.certificate is not None
    before = set(Path("/proc/self/fd").iterdir())
    server_context(keys.certificate)
    assert set(Path("/proc/self/fd").iterdir()) <= before
    for secret in (keys.secret, keys.http_token, "PRIVATE"):
        assert secret not in repr(keys)
