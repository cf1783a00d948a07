from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console
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
CHATS = ("--multi-turn", "--conversations", "2", "--turns", "2", "--output-tokens", "4")


def test_json_has_every_figure(server: FakeOpenAI) -> None:
    result = bench(server.url, "--input-tokens", "5,9", *SMALL, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    rows = json.loads(result.stdout)
    assert [(row["input_tokens"], row["concurrency"], row["num_requests"]) for row in rows] == [
        (5, 1, 3),
        (5, 2, 3),
        (9, 1, 3),
        (9, 2, 3),
    ]
    assert {
        "first_gap_ms_median",
        "first_gap_ms_p99",
        "itl_ms_median",
        "ttft_ms_p99",
        "kv_megabytes_mean",
    } <= set(rows[0])


def test_a_table_says_medians_totals_and_duration(server: FakeOpenAI) -> None:
    result = bench(server.url, "--input-tokens", "5", *SMALL, "--slo", "e2e=60s")
    assert result.exit_code == 0, result.stderr
    for word in ("median", "p99", "took", "reqs", "good", "share"):
        assert word in result.stdout
    assert "in all: 6 requests, 0 errors, 30 prompt and 24 output tokens in " in result.stdout
    assert "rate" not in result.stdout, "nothing was sent at a rate"


def test_a_rate_instead_of_concurrency(server: FakeOpenAI) -> None:
    result = bench(
        server.url, "--input-tokens", "5", "--output-tokens", "2", "--num-requests", "4",
        "--request-rate", "200,400", "--burstiness", "0.5", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["request_rate"], row["concurrency"], row["burstiness"]) for row in rows] == [
        (200.0, None, 0.5),
        (400.0, None, 0.5),
    ]


def test_a_trace_and_a_report(server: FakeOpenAI, tmp_path: Path) -> None:
    trace, report = tmp_path / "trace.jsonl", tmp_path / "report.html"
    line = {"timestamp": 5, "input_length": 6, "output_length": 2, "hash_ids": [1]}
    trace.write_text(f"{json.dumps(line)}\n" * 3)
    result = bench(
        server.url, "--trace", str(trace), "--num-requests", "2", "--report", str(report)
    )
    assert result.exit_code == 0, result.stderr
    assert "in all: 2 requests, 0 errors, 12 prompt and 4 output tokens" in result.stdout
    assert [len(prompt) for prompt in server.prompts[1:]] == [6, 6]
    assert "as in the trace" in report.read_text()


def test_a_broken_trace_is_refused_before_anything_starts(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 6}\n')
    result = run("serve", "--trace", str(trace))
    assert result.exit_code == 2
    assert "line 1" in result.stderr
    assert "output_length" in result.stderr


def test_chats(server: FakeOpenAI) -> None:
    result = bench(server.url, *CHATS, "--seed", "3", "--format", "json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["seed"], report["working_set_tokens"]) == (3, 2 * (128 + 4 + 32 + 4))
    assert [turn["input_tokens"] for turn in report["turns"]] == [128, 164]
    assert "--seed 3" in bench(server.url, *CHATS, "--seed", "3").stdout


def test_chats_have_a_page_and_vllm_s_lines_too(server: FakeOpenAI, tmp_path: Path) -> None:
    page = tmp_path / "chats.html"
    result = bench(server.url, *CHATS, "--report", str(page), "--format", "vllm")
    assert result.exit_code == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["completed"] for turn in turns] == [2, 2]
    # Each of 2 chats: the first message of 128 tokens; that, an answer of 4 and another of 32.
    assert [turn["total_input_tokens"] for turn in turns] == [2 * 128, 2 * 164]
    written = page.read_text()
    for told in ("Throughput over turn", "128 in, turn 1, 4 at once", "164 in, turn 2, 4 at once"):
        assert told in written
    assert "over concurrency" not in written


def test_goodput_of_each_turn_of_chats(server: FakeOpenAI, tmp_path: Path) -> None:
    page = tmp_path / "chats.html"
    for goals, share in (("ttft=60s,e2e=60s", 1.0), ("ttft=0.000001", 0.0)):
        slo = ("--slo", goals, "--report", str(page))
        result = bench(server.url, *CHATS, *slo, "--format", "json")
        assert result.exit_code == 0, result.stderr
        turns = json.loads(result.stdout)["turns"]
        assert [turn["good_share"] for turn in turns] == [share, share]
        assert all((turn["goodput_per_s"] > 0) == (share > 0) for turn in turns)
        assert "Goodput over turn" in page.read_text()
    assert "good" in bench(server.url, *CHATS, "--slo", "e2e=60s").stdout
    assert "good" not in bench(server.url, *CHATS).stdout


@pytest.mark.parametrize("options", [SMALL, CHATS])
def test_what_a_deployment_answers_tells_a_terminal_nothing(
    server: FakeOpenAI, options: tuple[str, ...]
) -> None:
    server.refuses_after, server.refusal = 2, "[red]full[/red]\x1b[2J\x9b31m\u202e"
    result = bench(server.url, *options)
    assert r"429: [red]full[/red]\x1b[2J\x9b31m\u202e" in result.stderr
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.output)


@pytest.mark.parametrize("options", [SMALL, CHATS])
def test_files_have_the_kinds_of_errors_and_not_their_words(
    server: FakeOpenAI, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """A deployment may quote prompts; whoever measures reads them on the terminal."""
    server.refuses_after, server.refusal = 2, "cannot read: the prompt"
    page = tmp_path / "page.html"
    result = bench(server.url, *options, "--format", "json", "--report", str(page))
    assert result.exit_code == 1
    assert "HTTP 429: cannot read: the prompt" in result.stderr
    assert "HTTP 429" in result.stdout
    assert "HTTP 429" in page.read_text()
    assert "the prompt" not in result.stdout + page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--turns", "3"), "--turns: only for --multi-turn"),
        (("--multi-turn", "--num-requests", "3"), "--num-requests: not for --multi-turn"),
        (
            ("--multi-turn", "--concurrency", "1,2"),
            "takes one --input-tokens and one --concurrency",
        ),
        (("--prefill", "2"), "--prefill: for a deployment that is started here"),
        (("--port", "1", "--host", "::1"), "--host, --port: for a deployment that is started here"),
        (
            ("--step-ms", "1,2"),
            "'1,2' is neither a positive number nor a list of one for each of 1,4,16",
        ),
        (("--step-ms", "1,nan,2"), "'1,nan,2' is neither"),
        (("--step-ms", "inf"), "'inf' is neither"),
        (
            ("--input-tokens", "0"),
            "Invalid value for '--input-tokens': '0' is not a list of positive numbers",
        ),
        (("--concurrency", "a"), "'a' is not a list of positive numbers"),
        (("--bare-gb-per-s", "0"), "'0' is neither"),
        (("--request-rate", "0"), "'0' is not a list of positive numbers such as 0.5,2,8"),
        (("--request-rate", "2", "--concurrency", "3"), "--concurrency: not with --request-rate"),
        (("--burstiness", "2"), "--burstiness: only with --request-rate"),
        (("--request-rate", "2", "--burstiness", "0"), "0 is not above 0"),
        (("--slo", "ttfb=3"), "'ttfb' is none of ttft, tpot, itl, e2e"),
        (("--trace-speed", "2"), "--trace-speed: only with --trace"),
        (("--trace", __file__, "--input-tokens", "3"), "--input-tokens: not with --trace"),
    ],
)
def test_options_that_say_nothing_are_refused(options: tuple[str, ...], message: str) -> None:
    result = bench("http://127.0.0.1:1", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_address_for_a_deployment_of_its_own_is_refused() -> None:
    result = run("serve", "--port", "9000")
    assert result.exit_code == 2
    assert "--port: what is started here listens on a free port of 127.0.0.1" in result.stderr


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in a shell's background"])
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
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


def test_rows_are_told_in_words_where_a_table_does_not_fit() -> None:
    row, headings = (
        {"a": 1.234, "b": None, "c": "x"},
        {"a": "first\nms", "b": "second", "c": "the\nlast"},
    )
    shown = {}
    for width in (12, 80):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_table([row], headings, console)
        assert isinstance(console.file, io.StringIO)
        shown[width] = console.file.getvalue()
    assert " ".join(shown[12].split()) == "first ms 1.23, second -, the last x"
    assert "first" in shown[80]
    assert "," not in shown[80]


@pytest.mark.parametrize(
    "options",
    [
        ("transfer", "--connectors", "file", "--path", "p2p"),
        ("transfer", "--mooncake-protocol", "tcp,rdma"),
        ("transfer", "--connectors", "pigeon"),
        ("transfer", "--tp-pairs", "1x1,2"),
        ("transfer", "--device", "tpu"),
        ("transfer", "--mooncake-protocol", "post"),
    ],
)
def test_wrong_values_start_nothing(options: tuple[str, ...]) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert options[-1] in result.stderr


def test_a_deployment_that_is_not_there_is_told_in_words() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        result = bench(url)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} does not answer /v1/models: Connection refused\n"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "localhost:8000", "http://", "http://[::1", "http://a:99999", "ftp://a"],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    result = bench(url)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} is no URL of a deployment; write http://host:port\n"
