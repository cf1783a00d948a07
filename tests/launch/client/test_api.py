"""Calls of a deployment, and whom the key of a command is sent to."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from tests.launch.client.conftest import serving


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


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_what_runs_here_is_asked_past_proxies(proxied: list[str | None], host: str) -> None:
    with serving() as (url, keys):
        assert Api(url.replace("127.0.0.1", host), "mine", 10.0).get("/health")[0] == 200
    assert (keys, proxied) == (["Bearer mine"], [])


def test_others_are_asked_through_the_proxy_unless_the_environment_excepts_them(
    proxied: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api("http://localhost.nowhere.invalid:8000", "mine", 10.0)
    assert api.get("/health")[0] == 200
    assert proxied == ["Bearer mine"]
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError("no such host")))
    with pytest.raises(PdlaunchError, match="no such host"):
        api.get("/health")
    assert len(proxied) == 1
