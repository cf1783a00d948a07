"""``pdlaunch status`` against an HTTP server that answers as a router does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import Result

from pdlaunch.protocol.process import run_dirs
from tests.cli.deployment_server import (
    HOSTILE,
    DeploymentServer,
    deployment,
    engine,
    running_server,
)
from tests.command_line import invoke
from tests.launch.client.conftest import answering


@pytest.fixture(autouse=True)
def _no_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)


@pytest.fixture
def router() -> Iterator[DeploymentServer]:
    with running_server() as server:
        yield server


def run(*arguments: str, columns: int = 150, **environ: str) -> Result:
    given = ["status", *arguments]
    return invoke(given, env={"COLUMNS": str(columns), "NO_COLOR": "1", **environ})


def test_it_shows_engines_pairs_rates_and_events(router: DeploymentServer) -> None:
    result = run(router.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "tiny · ok · up 1 h 6 min · pdlaunch 0.1.0"
    assert "4 requests/s · 40 tokens/s · 3 in flight · first token 11.4 ms (p95 26 ms)" in lines[1]
    (row,) = (line.split() for line in lines if line.strip().startswith("decode-0"))
    assert row == [
        *("decode-0", "decode", "127.0.0.1", "ready", "4", "3", "1", "50%", "-"),
        *("30%", "10%", "20%", "1.5GB/s"),
    ]
    assert "prefill-0 -> decode-0 p2p/posix_fd/batch1" in " ".join(result.output.split())
    assert "392 GB/s" in result.output
    assert "decode-7 has been gone for 1 min" in lines


def test_names_of_others_reach_no_terminal_as_commands(router: DeploymentServer) -> None:
    router.status = deployment(engine(HOSTILE, "decode", state="failed", reason=HOSTILE))
    output = run(router.url).output
    assert "\x1b" not in output
    assert "\x07" not in output
    assert r"[red]x[/red]\x1b[31m\x07\n<b>" in output
    assert r"\[red]" not in output


def test_engines_and_pairs_that_get_nothing_new_are_told(router: DeploymentServer) -> None:
    why = "3 requests in a row have failed"
    out, trial = engine("decode-0", "decode", health="open", left_out=why), {"health": "half_open"}
    router.status = deployment(out, engine("decode-1", "decode", **trial))
    pairs = [msgspec.structs.replace(pair, health="open") for pair in router.status.pairs]
    router.status = msgspec.structs.replace(router.status, pairs=pairs)
    output = run(router.url, columns=200).output
    (row,) = [line for line in output.splitlines() if "decode-1 " in line]
    assert " on trial " in row
    assert "decode-0 gets nothing new: 3 requests in a row have failed" in output
    assert "left out" in output
    assert "no pull is begun for a while" in output


def test_json_is_what_the_router_says(router: DeploymentServer) -> None:
    told = json.loads(run(router.url, "--format", "json").output)
    assert told["engines"][0]["reading"]["kv_usage"] == 0.5
    assert told["pairs"][0]["path"] == "p2p/posix_fd/batch1"
    assert len(told["history"]) == 20


def test_the_key_comes_from_the_flag_or_the_environment(router: DeploymentServer) -> None:
    router.key = "the-key"
    refused = run(router.url)
    assert refused.exit_code == 1
    assert "--api-key" in refused.output
    assert run(router.url, "--api-key", "the-key").exit_code == 0
    assert run(router.url, PDLAUNCH_API_KEY="the-key").exit_code == 0
    assert run(PDLAUNCH_URL=router.url, PDLAUNCH_API_KEY="the-key").exit_code == 0


def test_what_cannot_be_asked_is_said() -> None:
    assert "name another's router by its URL" in run().output
    nobody = run("http://127.0.0.1:9")
    assert nobody.exit_code == 1
    assert "cannot be reached" in nobody.output
    assert run("127.0.0.1").exit_code == 1


def test_another_version_s_router_is_no_traceback(router: DeploymentServer) -> None:
    router.answer = lambda path, key: (200, b'{"engines": []}')  # type: ignore[method-assign]
    result = run(router.url)
    assert result.exit_code == 1
    assert "no pdlaunch of this version" in result.output


@pytest.mark.parametrize("head", ["HTTP/1.1 404 Not Found", "HTTP/1.1 200 OK"])
@pytest.mark.parametrize(
    ("body", "said"),
    [("{}", "stopped in the middle of its answer"), ("[" * 200_000, "nested too deeply")],
)
def test_what_is_no_router_is_no_traceback(head: str, body: str, said: str) -> None:
    answer = f"{head}\r\nContent-Length: {max(1000, len(body))}\r\n\r\n{body}".encode()
    with answering(lambda connection: connection.sendall(answer)) as url:
        result = run(url)
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {url}/pdlaunch/status ")
    assert said in result.output
