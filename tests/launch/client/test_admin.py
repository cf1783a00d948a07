"""A command goes to the launch that is meant."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client import api as api_module
from pdlaunch.launch.client.api import Api, admin_api
from pdlaunch.protocol.process.run_dirs import (
    ADMIN_SOCKET,
    LaunchCard,
    new_run_dir,
    running_launches,
)


class Launches:
    def __init__(self, base: Path, stack: ExitStack) -> None:
        self.base = base
        self._stack = stack

    def add(self, url: str) -> Path:
        run_dir = self._stack.enter_context(new_run_dir(self.base))
        LaunchCard(launch_id="id", url=url).write(run_dir)
        return run_dir

    def why_not(self, url: str | None = None) -> str:
        with pytest.raises(PdlaunchError) as caught:
            admin_api(url, base=self.base)
        return str(caught.value)


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    with ExitStack() as stack:
        yield Launches(tmp_path, stack)


def socket_of(api: Api) -> Path | None:
    return api.socket_path


def test_the_only_one_is_meant_and_several_are_told_apart_by_their_url(launches: Launches) -> None:
    first = launches.add("http://127.0.0.1:8000")
    assert socket_of(admin_api(base=launches.base)) == first / ADMIN_SOCKET
    second = launches.add("http://[::1]:9000")
    assert "http://127.0.0.1:8000, http://[::1]:9000" in launches.why_not()
    for url, run_dir in [
        ("http://localhost:8000", first),
        ("http://127.0.0.1:8000/", first),
        ("http://localhost:9000", second),
    ]:
        assert socket_of(admin_api(url, base=launches.base)) == run_dir / ADMIN_SOCKET


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8001", "http://elsewhere:8000", "http://127.0.0.1"]
)
def test_another_s_router_needs_its_key(launches: Launches, url: str) -> None:
    launches.add("http://127.0.0.1:8000")
    assert f"no launch of yours listens at {url}" in launches.why_not(url)
    assert socket_of(admin_api(url, "key", base=launches.base)) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make folders of others")
def test_a_folder_that_another_user_has_made_is_no_launch(launches: Launches) -> None:
    run_dir = launches.add("http://127.0.0.1:8000")
    os.chown(run_dir, 65534, 65534)
    assert running_launches(launches.base) == []


def test_an_api_over_a_unix_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "admin.sock"
    api = Api("http://launch", socket_path=path, timeout_s=20)
    with pytest.raises(
        PdlaunchError, match=rf"/x at {path} cannot be reached: No such file or directory"
    ):
        api.get("/x")
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor(1) as pool:
        # As while a router is replaced: its socket is there, and nobody listens.
        server.bind(str(path))
        asked: list[Future[bytes]] = []

        def answer() -> bytes:
            with server.accept()[0] as connection:
                request = connection.recv(65536)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 7}')
            return request

        def come(_: float) -> None:
            server.listen()
            asked.append(pool.submit(answer))

        monkeypatch.setattr(api_module.time, "sleep", come)
        assert api.get_object("/pdlaunch/engines/decode-0/x?a=b") == (200, {"a": 7})
        assert asked[0].result().startswith(b"GET /pdlaunch/engines/decode-0/x?a=b ")
