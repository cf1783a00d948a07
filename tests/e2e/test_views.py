"""Views of a real launch: the status line of its terminal, ``pdlaunch status`` and ``top``."""

import re
from typing import Any

import pytest

from pdlaunch.launch.client.api import own_launches
from tests.cli.terminal import Terminal
from tests.e2e.api import streamed
from tests.e2e.client import Deployment
from tests.e2e.test_request_traces import post
from tests.e2e.test_scale import run
from tests.e2e.waiting import await_true

COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)(?:;\d+)*m")


@pytest.fixture(scope="module", autouse=True)
def asked(demo: Deployment) -> None:
    body: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    for number in range(3):
        post(demo.url, body | {"prompt": f"View number {number} of this. " * 8}, f"view-{number}")


def test_the_terminal_of_serve_has_a_status_line(demo: Deployment) -> None:
    line = re.compile(
        r"^\[\d\d:\d\d:\d\d\] [\d.]+ requests/s, [\d.]+k? tokens/s, \d+ running, \d+ waiting, "
        r"KV prefill \d+% decode \d+%, pulls [\d.]+ [kMG]?B/s, \d+ errors?$",
        re.MULTILINE,
    )
    await_true(lambda: line.search(demo.output()) is not None, "the line has come")


def test_the_start_says_which_engine_auto_has_come_to(demo: Deployment) -> None:
    assert "engine: native, because smollm2 is the demo model; vLLM: " in demo.output()


def test_status_tells_engines_and_pairs(demo: Deployment) -> None:
    shown = run("status", "--url", demo.url)
    assert "\x1b" not in shown
    rows = [line.split()[:3] for line in shown.splitlines()]
    assert ["prefill-0", "prefill", "ready"] in rows
    assert ["decode-0", "decode", "ready"] in rows
    assert re.search(r"prefill-0 -> decode-0 +\S+( \([^)]+\))? +[\d.]+ GB/s", shown)
    assert re.search(r"\d+ requests, \d+ errors", shown)


def test_doctor_asks_the_engines_of_an_own_launch_through_its_socket(
    demo: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests may have launches here.
    monkeypatch.setattr("pdlaunch.cli.doctor.own_launches", lambda _: own_launches(demo.url))
    said = run("doctor")
    assert "a canary moved" in " ".join(said.split())
    # The router reports the path of the pair, and its speed.
    assert not re.search("PD650|PD663|UCX_PROTO_INFO", said)


def test_top_watches_it_on_a_small_terminal_without_colour(demo: Deployment) -> None:
    terminal = Terminal("--url", demo.url, "--every", "0.2", columns=80, rows=24, NO_COLOR="1")
    try:
        with streamed(demo.url, list(range(1000, 1400)), 1400) as tokens:
            next(tokens)
            pair = re.compile(r"prefill-0 -> decode-0 +\S+( \([^)]+\))? +[\d.]+ GB/s")
            text = terminal.until(lambda text: pair.search(text) and "1 in flight" in text)
            rows = [line.split() for line in text.splitlines() if line.strip()]
            assert "2 engines" in text.splitlines()[1]
            states = [row[2] for row in rows if row[0] in ("decode-0", "prefill-0")]
            assert states.count("ready") == 2
        terminal.press("\x03")
        assert terminal.end() == 130
        assert terminal.is_restored()
        assert not COLOUR.search(terminal.written)
    finally:
        terminal.close()
