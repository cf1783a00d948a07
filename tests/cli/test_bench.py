import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import Result

from pdlaunch.cli.output import print_table
from tests.bench.fake_openai import FakeOpenAI
from tests.command_line import invoke


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI().in_thread() as running:
        yield running


def run(*arguments: str) -> Result:
    command = ["bench", *arguments]
    return invoke(command, env={"COLUMNS": "200", "NO_COLOR": "1"})


def bench(url: str, *arguments: str) -> Result:
    return run("serve", "--url", url, *arguments)


SMALL = ("--output-tokens", "4", "--concurrency", "1,2", "--num-requests", "3")


def test_json_has_a_row_for_each_load(server: FakeOpenAI) -> None:
    small = ("--input-tokens", "5", "--output-tokens", "2", "--num-requests", "4")
    rates = ("--request-rate", "200,400", "--burstiness", "0.5", "--format", "json")
    result = bench(server.url, *small, *rates)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    rows = json.loads(result.stdout)
    found = [(row["request_rate"], row["concurrency"], row["burstiness"]) for row in rows]
    assert found == [(200.0, None, 0.5), (400.0, None, 0.5)]
    assert {"first_gap_ms_p99", "itl_ms_median", "cached_share"} <= set(rows[0])


def test_a_table_says_medians_totals_and_duration(server: FakeOpenAI) -> None:
    result = bench(server.url, "--input-tokens", "5", *SMALL, "--slo", "e2e=60000")
    assert result.exit_code == 0, result.stderr
    for word in ("median", "p99", "took", "reqs", "good", "share"):
        assert word in result.stdout
    assert "in all: 6 requests, 0 errors, 30 prompt and 24 output tokens in " in result.stdout
    assert "rate" not in result.stdout, "nothing was sent at a rate"
    environ = {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm"}
    narrow = invoke(["bench", "serve", "--url", server.url, *SMALL], env=environ).stdout
    lines = re.sub(r"\x1b\[[\d;]*m", "", narrow).splitlines()
    assert "columns left out: --format json shows all" in narrow
    assert max(map(len, lines)) <= 80


def test_a_table_says_which_requests_took_a_pair_and_why(server: FakeOpenAI) -> None:
    server.route = 'prefill-0->decode-0; kind=pair; reason="the pair that waits least"'
    assert "pairs" in bench(server.url, "--input-tokens", "5", *SMALL).stdout
    server.route = 'decode-0; kind=decode; reason="the prefill queue is longer"'
    result = bench(server.url, "--input-tokens", "5", *SMALL)
    assert "routes of the last load: 100% decode (the prefill queue is longer)" in result.stdout
    rows = json.loads(bench(server.url, *SMALL, "--format", "json").stdout)
    assert [row["pair_share"] for row in rows] == [0.0, 0.0]


def test_words_of_a_deployment_are_no_commands_and_in_no_file(
    server: FakeOpenAI, tmp_path: Path
) -> None:
    """A deployment may quote prompts; whoever measures reads them on the terminal."""
    server.refuses_after, server.refusal = 2, "[red]the prompt[/red]\x1b[2J\x9b31m\u202e"
    page = tmp_path / "page.html"
    result = bench(server.url, *SMALL, "--format", "json", "--report", str(page))
    assert result.exit_code == 1
    assert r"HTTP 429: [red]the prompt[/red]\x1b[2J\x9b31m\u202e" in result.stderr
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.output)
    assert "HTTP 429" in result.stdout
    assert "HTTP 429" in page.read_text()
    assert "the prompt" not in result.stdout + page.read_text()


URL = ("serve", "--url", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*URL, "--prefill", "2"), "--prefill: only without --url"),
        ((*URL, "--port", "1", "--host", "::1"), "--host, --port: only without --url"),
        (
            (*URL, "--input-tokens", "0"),
            "Invalid value for '--input-tokens': '0' is not a list of positive numbers",
        ),
        ((*URL, "--request-rate", "1,nan"), "'1,nan' is not a list of positive numbers"),
        ((*URL, "--request-rate", "0"), "'0' is not a list of positive numbers such as 0.5,2,8"),
        (
            (*URL, "--request-rate", "2", "--concurrency", "3"),
            "--concurrency: not with --request-rate",
        ),
        ((*URL, "--burstiness", "2"), "--burstiness: only with --request-rate"),
        ((*URL, "--request-rate", "2", "--burstiness", "0"), "Invalid value for '--burstiness'"),
        ((*URL, "--slo", "ttfb=3"), "`ttfb`"),
        ((*URL, "--trace-speed", "2"), "--trace-speed: only with --trace"),
        ((*URL, "--trace", __file__, "--input-tokens", "3"), "--input-tokens: not with --trace"),
        (("serve", "--port", "9000"), "--port: this command's deployment listens on a free port"),
        (("transfer", "--mooncake-protocol", "tcp,rdma"), "rdma"),
        (("transfer", "--path", "p2p,pigeon"), "pigeon"),
        (("transfer", "--device", "tpu"), "tpu"),
    ],
)
def test_wrong_options_are_refused_and_start_nothing(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("number", "ignored"),
    # A shell lets SIGINT be ignored in its background.
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
@pytest.mark.processes
def test_it_can_be_ended_quietly(server: FakeOpenAI, number: signal.Signals, ignored: bool) -> None:
    server.hold = True
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.{"SIG_IGN" if ignored else "default_int_handler"})
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pdlaunch.cli import main
main()
"""
    command = [sys.executable, "-c", code, "bench", "serve", "--url", server.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.asked.wait(180)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=180)
    assert (process.returncode, stdout, stderr) == (128 + number, "", "error: interrupted\n")


@pytest.mark.processes
def test_a_measuring_process_ends_with_the_command() -> None:
    endless = "print('measuring', flush=True); __import__('threading').Event().wait()"
    code = f"from pdlaunch.cli.bench import run_module; run_module('timeit', {endless!r}, stdout=1)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"measuring\n"
        measuring = psutil.Process(process.pid).children()
        process.kill()
    assert len(measuring) == 1
    assert not psutil.wait_procs(measuring, timeout=180)[1]


def test_rows_are_told_in_words_where_a_table_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, headings = (
        {"a": 1.234, "b": None, "c": "x"},
        {"a": "first\nms", "b": "second", "c": "the\nlast"},
    )
    shown = {}
    for width in (12, 80):
        with monkeypatch.context() as patch:
            for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm"}.items():
                patch.setenv(name, value)
            print_table([row], headings)
        shown[width] = capsys.readouterr().out
    assert " ".join(shown[12].split()) == "first ms 1.23, second -, the last x"
    assert "first" in shown[80]
    assert "," not in shown[80]


def test_a_deployment_that_is_not_there_is_told_in_words() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        result = bench(url)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} does not answer /v1/models: Connection refused\n"
