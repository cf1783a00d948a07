"""``pdlaunch doctor`` in front of engines that answer as vLLM does."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import Result

from pdlaunch.cli.doctor import _transport, is_here
from pdlaunch.launch.engines import OF_RUNNING_ENGINES
from pdlaunch.protocol.process import run_dirs
from tests.bench.fake_openai import in_thread
from tests.command_line import invoke
from tests.launch.sidecar.fake_vllm import BLOCK_SIZE, BYTES_OF_TOKEN, FakeVllm, listen
from tests.machine.test_ucx_log import table

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "PD650": ({"healthy": False}, "is not healthy"),
    "PD651": ({"version": "0.31.1"}, "version 0.31.1, of prefill"),
    "PD652": ({"model": "other"}, "models other"),
    "PD653": ({"cache_dtype": "fp8"}, "KV dtype fp8"),
    "PD654": ({"moves_bytes": False}, "computed the prompt itself"),
    "PD655": ({"prompt_tokens": 77}, "77 tokens of prompts, 0 KV bytes read"),
    "PD656": ({"num_expired": 2}, "2 leases have expired"),
    "PD657": ({"num_failed_reads": 3}, "3 transfers have failed"),
    "PD658": ({"server_info": {}}, "dev mode is on"),
    "PD663": (
        {"num_bytes": 2**30, "seconds_read": 1e6, "num_pieces": 2**15 - 1},
        "1 GiB read in pieces of 32 KiB, 0.00 GB/s",
    ),
}
"""What is wrong with the decode engine, and words of the finding."""


@contextlib.contextmanager
def serving(folder: Path, **decode: Any) -> Iterator[tuple[FakeVllm, FakeVllm, list[str]]]:
    shares: dict[str, list[int]] = {}
    engines = (FakeVllm("prefill", shares), FakeVllm("decode", shares, **decode))
    paths = [folder / f"{engine.name}.sock" for engine in engines]
    flags = [f"--{engine.name}=unix:{path}" for engine, path in zip(engines, paths, strict=True)]
    with in_thread(*map(listen, engines, paths)):
        yield *engines, flags


def run(*flags: str) -> Result:
    arguments = ["doctor", *flags]
    return invoke(arguments)


def report_of(result: Result) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_a_good_pair_is_proven_by_one_short_prompt(tmp_path: Path) -> None:
    with serving(tmp_path) as (prefill, decode, flags):
        result = run(*flags, "--format", "json")
        assert result.exit_code == 0, result.output
        assert [len(engine.bodies) for engine in (prefill, decode)] == [2, 1]
        assert "fix:" not in run(*flags).output
    report = report_of(result)
    assert {item["rule"] for item in report["findings"]} == {"PD660"}
    (pair,) = report["resolved"]["deployment"]["pairs"]
    assert pair["num_bytes"] == (2 * BLOCK_SIZE + 1) * BYTES_OF_TOKEN
    texts = [item["message"] for item in report["findings"]]
    assert any("vLLM 0.32.0+cpu" in text for text in texts)
    assert any("too few to measure a speed" in text for text in texts)
    assert any("the transport of UCX is unknown" in text for text in texts)


@pytest.mark.parametrize("code", WRONG)
def test_what_is_wrong_is_named_and_fails_the_check(tmp_path: Path, code: str) -> None:
    behaviour, words = WRONG[code]
    with serving(tmp_path, **behaviour) as (_, _, flags):
        result = run(*flags, "--strict", "--format", "json")
    assert result.exit_code == 1, result.output
    found = [item["message"] for item in report_of(result)["findings"] if item["rule"] == code]
    assert any(words in message for message in found), found


def test_every_rule_of_the_doctor_is_seen_here() -> None:
    assert {*WRONG, "PD660", "PD661", "PD664"} == OF_RUNNING_ENGINES


def test_an_address_at_which_decode_finds_itself(tmp_path: Path) -> None:
    """Also where the canary has died of it."""
    for moves_bytes in (True, False):
        with serving(tmp_path, moves_bytes=moves_bytes) as (prefill, _, flags):
            prefill.side_channel = ("0.0.0.0", 5600)
            result = run(*flags, "--format", "json")
        assert result.exit_code == 1
        messages = {item["rule"]: item["message"] for item in report_of(result)["findings"]}
        assert "sends decode to 0.0.0.0" in messages["PD661"]
        assert ("PD654" in messages) == (not moves_bytes)


@pytest.mark.processes
def test_the_transport_stands_in_the_log_of_an_engine_on_this_host(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(table(("0..inf", "software emulation", "tcp/lo")))
    listen = "import socket, sys; s = socket.create_server(('127.0.0.1', 0))"
    program = f"{listen}; print(s.getsockname()[1], file=sys.stderr, flush=True); input()"
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.PIPE,
        ) as engine,
    ):
        assert engine.stderr is not None
        port = int(engine.stderr.readline())
        assert _transport(f"http://127.0.0.1:{port}") == "tcp, software emulation"
        engine.kill()
    assert _transport(f"http://127.0.0.1:{port}") == ""


def test_without_a_canary_no_prompt_is_sent(tmp_path: Path) -> None:
    with serving(tmp_path, moves_bytes=False) as (prefill, decode, flags):
        result = run(*flags, "--no-canary", "--format", "json")
        assert not prefill.bodies
        assert not decode.bodies
    assert result.exit_code == 0
    unchecked = report_of(result)["resolved"]["not_checked"]
    assert [item["rule"] for item in unchecked] == ["PD654", "PD661"]


def test_exact_tokens_are_compared_where_they_must_be_equal(tmp_path: Path) -> None:
    with serving(tmp_path, garbles=True) as (_, _, flags):
        assert run(*flags).exit_code == 0
        result = run(*flags, "--exact")
    assert (result.exit_code, "wrong KV blocks" in result.output) == (1, True)


def listed(*engines: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "url": url, "name": f"{role}-0"} for role, url in engines]


def test_a_router_names_its_engines_and_gets_no_key_nor_names_who_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could list an address of its own; whoever asks it names the engines that he trusts."""
    monkeypatch.setenv("KEY_OF_ENGINES", "secret")
    with serving(tmp_path) as (prefill, decode, flags):
        urls = [flag.partition("=")[2] for flag in flags]
        slow = {"prefill": "prefill-0", "decode": "decode-0", "slow": "PD504 0.05 GB/s"}
        slow |= {"path": "nixl/UCX (cma)", "gigabytes_per_s": 0.05}
        fast = slow | {"decode": "decode-1", "slow": "", "gigabytes_per_s": None}
        engines = listed(("prefill", urls[0]), ("decode", urls[1]))
        prefill.status = {"engines": engines, "pairs": [slow, fast]}
        arguments = (urls[0], "--engine-key-env", "KEY_OF_ENGINES", "--format", "json")
        result = run(*arguments)
        assert result.exit_code == 0
        said = [each for each in report_of(result)["findings"] if each["rule"] == "PD663"]
        told = [(each["where"], each["message"]) for each in said]
        assert told == [("prefill-0 -> decode-0", "PD504 0.05 GB/s")]
        seen = [each for each in report_of(result)["findings"] if each["rule"] == "PD660"]
        assert {each["where"] for each in seen} >= {"prefill-0", "decode-0"}
        told = [each["message"] for each in seen if each["where"] == "prefill-0 -> decode-0"]
        assert told[0] == "nixl/UCX (cma), 0.05 GB/s"
        assert re.fullmatch(r"a canary moved .+ in [\d.]+ s", told[1])
        assert prefill.keys | decode.keys == {None}
        result = run(*arguments, flags[1])
        assert len(report_of(result)["resolved"]["deployment"]["engines"]) == 2
        assert "Bearer secret" in decode.keys
        assert prefill.keys == {None}
        prefill.status = {}
        assert "do not report their role" in run(urls[0]).stderr


def test_engines_of_both_roles_are_examined_and_get_no_canary(tmp_path: Path) -> None:
    with serving(tmp_path, model="other", version="0.31.1") as (prefill, decode, flags):
        urls = [flag.partition("=")[2] for flag in flags]
        prefill.status = {"engines": listed(("prefill", urls[0]), ("both", urls[1])), "pairs": []}
        for arguments in ((urls[0],), (flags[0], f"--both={urls[1]}")):
            result = run(*arguments, "--format", "json")
            assert result.exit_code == 1
            found = {item["rule"]: item for item in report_of(result)["findings"]}
            # It is beside the pairs: its version may be another one, its model may not.
            assert "models other" in found["PD652"]["message"]
            assert found.keys() == {"PD652", "PD660"}
            assert report_of(result)["resolved"]["deployment"]["pairs"] == []
        assert not decode.bodies
        prefill.status = {"engines": listed(("critic", urls[1])), "pairs": []}
        result = run(urls[0])
        assert (result.exit_code, "engine of role critic" in result.stderr) == (2, True)


def test_unusable_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for flags, words in (
        ([], "no engine is named, and no launch runs here"),
        (["--prefill=host:8000", "--decode=http://d"], "not a URL"),
        (["--prefill=http://p", "--decode=http://d:8000/v1"], "is not the URL of an engine"),
        (["--prefill=http://[p", "--decode=http://d"], "'http://[p' is not a URL"),
        (["http://user:of-mine@r:8000"], "URL: a URL must hold no user or key"),
        (
            ["--prefill=http://p", "--decode=http://d", "--engine-key-env=NO_SUCH_KEY"],
            "the variable is not set",
        ),
    ):
        result = run(*flags)
        assert result.exit_code == 2
        assert words in result.stderr
        assert "of-mine" not in result.output


FAR = "http://198.51.100.1:8000"
"""An address of nobody."""


def test_addresses_of_this_machine_are_here() -> None:
    devices = psutil.net_if_addrs().values()
    own = {each.address for found in devices for each in found if each.family.name == "AF_INET"}
    assert own
    assert all(is_here(f"http://{address}:8000") for address in own)
    assert is_here("unix:/run/p.sock")
    assert not is_here(FAR)
    assert not is_here("http://no-such-host.invalid:1")
