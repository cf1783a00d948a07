from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner, Result

from pdlaunch.cli.app import build_app


def bench(url: str) -> Result:
    command = ["bench", "serve", "--url", url]
    return CliRunner().invoke(build_app(command), command, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_deployment_that_is_not_there_is_told_in_words() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        result = bench(url)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} does not answer /v1/models: Connection refused\n"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "http://", "http://[::1", "http://a:99999", "ftp://a"])
def test_what_is_no_url_is_refused(url: str) -> None:
    result = bench(url)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} is no URL of a deployment; write http://host:port\n"
