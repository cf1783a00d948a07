import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest

from pdlaunch.protocol.process.engine_ports import EnginePorts, bind_to_share
from tests.other_user import as_nobody

ANY = {"127.0.0.1": "0.0.0.0", "::1": "::"}
"""The addresses of all devices beside those of loopback."""


@pytest.fixture
def kept() -> Iterator[EnginePorts]:
    with contextlib.closing(EnginePorts()) as kept:
        yield kept


def serving(host: str = "127.0.0.1", port: int = 0, *, is_kept: bool = False) -> socket.socket:
    server = bind_to_share(host, port, is_kept=is_kept)
    server.listen()
    return server


def url_of(server: socket.socket, scheme: str = "http") -> str:
    host, port, *_ = server.getsockname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def listen(host: str, port: int, options: tuple[int, ...] = (socket.SO_REUSEADDR,)) -> str:
    """The name of the error; empty: whoever asks listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        for option in options:
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return ""


def listen_in_all_ways(host: str, port: int) -> dict[str, str]:
    reuse = socket.SO_REUSEADDR, socket.SO_REUSEPORT
    options = (), reuse[:1], reuse[1:], reuse
    return {
        f"{address} {chosen}": listen(address, port, chosen)
        for address, chosen in product((host, ANY[host]), options)
    }


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("host", ANY)
def test_no_other_user_gets_it_in_any_way(kept: EnginePorts, host: str) -> None:
    with serving(host) as server:
        port = server.getsockname()[1]
        kept.keep("decode-0", url_of(server))
    refused = as_nobody(partial(listen_in_all_ways, host, port))
    assert set(refused.values()) == {"EADDRINUSE"}
    kept.close()
    assert "" in as_nobody(partial(listen_in_all_ways, host, port)).values()


def test_a_certain_port_is_that_of_one_launch(kept: EnginePorts) -> None:
    """Its servers follow one another there; another launch of the same user is refused."""

    def is_refused() -> bool:
        try:
            serving(port=port).close()
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False

    with serving() as server:
        port = server.getsockname()[1]
        assert is_refused()
        assert "decode-0" not in kept
        kept.keep("decode-0", url_of(server))
        assert is_refused()
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            server.close()
            assert is_refused()
    assert "decode-0" in kept
    with serving(port=port, is_kept=True) as server:
        kept.keep("decode-0", url_of(server))
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert is_refused()
    assert is_refused()
    kept.release("decode-0")
    assert not is_refused()
