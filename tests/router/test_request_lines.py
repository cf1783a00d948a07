"""One line for each request, in the log and on the terminal."""

from __future__ import annotations

import io
import json
import logging

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.status import RequestSummary
from pdlaunch.router.request_history import format_request, log_request
from pdlaunch.router.request_record import RequestRecord
from tests.router.conftest import Stand, pair
from tests.router.test_life_of_a_request import completion
from tests.router.test_requests import told_pair

LOGGER = "pdlaunch.router.request_history"
SECRET = "secret words of a prompt"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


async def test_the_line_of_a_pair(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pdlaunch")
    await stand.start(told_pair())
    await stand.post(completion(prompt=SECRET))
    (line,) = lines(caplog)
    assert line.startswith("200 /v1/completions model=tiny prefill-0 -> decode-0 prompt=")
    for part in (
        "(cached device 16 host 4 remote 30)",
        "queue=1.5ms",
        "prefill=3.0ms",
        "pull=2.0ms 4.00MB 2.50GB/s verified",
        "first=",
        "tokens=6",
        "ms/token",
        "finish=length",
    ):
        assert part in line
    assert "secret" not in caplog.text


QUOTING = msgspec.json.encode(
    {"error": {"message": SECRET, "type": "InternalServerError", "code": SECRET}}
)


@pytest.mark.parametrize("how", ["body", "page", "redirect", "event", "malformed"])
async def test_what_an_engine_says_of_a_prompt_is_not_told(
    stand: Stand, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Engines quote prompts in their errors."""
    caplog.set_level(logging.DEBUG, "pdlaunch")
    await stand.start(pair())
    for engine in stand.engines.values():
        engine.error_body = QUOTING
        if how == "event":
            engine.error_after = 1
            engine.error_body = QUOTING.replace(b"InternalServerError", b"server_error")
        elif how == "malformed":
            engine.error_after = 1
            engine.error_body = msgspec.json.encode({"choices": [{"index": SECRET, "text": "x"}]})
        else:
            engine.status = 307 if how == "redirect" else 500
        if how == "page":
            engine.error_body = SECRET.encode()
    answer = await stand.post(completion(prompt="x", stream=how in ("event", "malformed")))
    (line,) = lines(caplog)
    assert "error: engine_failed: engine " in line, line
    assert "secret" not in answer.raw.decode()
    others = [record.getMessage() for record in caplog.records if record.name != LOGGER]
    assert "secret" not in "".join(others)
    assert "secret" not in line
    if how == "body":
        assert "answered 500 (InternalServerError)" in line
    for path in ("/pdlaunch/requests", "/pdlaunch/requests/" + answer.headers["X-Request-Id"]):
        async with stand.session.get(path) as response:
            assert "secret" not in await response.text()


HOSTILE = "m\n200 /v1/completions\x1b]0;x\x07[bold red]\u202e\x9b"


async def test_names_of_clients_are_escaped(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    """Model names can hold anything, ids any printable character."""
    caplog.set_level(logging.DEBUG, "pdlaunch")
    await stand.start(pair())
    shown: list[str] = []
    stand.router.history._show = shown.append
    headers = {"X-Request-Id": "[red]%s{}\\x1b", "User-Agent": "[blink]"}
    await stand.post(completion(model=HOSTILE), headers=headers)
    (line,) = lines(caplog)
    for text in (line, *shown):
        assert text.isprintable(), text
        assert r"\x1b]0;x\x07[bold red]\u202e\x9b" in text
    assert "[[red]%s{}\\x1b]" in shown[0]


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_summary_makes_a_terminal_obey(model: str, error: str, explanation: str) -> None:
    summary = RequestSummary(
        id="r", received_at=0.0, path="/", model=model, error=error, explanation=explanation
    )
    assert "\n" not in format_request(summary)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in format_request(summary))


def test_json_lines_hold_the_values_of_the_line() -> None:
    root, stream = logging.getLogger(), io.StringIO()
    handlers, levels = root.handlers[:], (root.level, logging.getLogger("pdlaunch").level)
    try:
        setup_logging("router", "info", form="json", stream=stream)
        record = RequestRecord("r7", "/v1/completions")
        record.end(200)
        log_request(record)
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        logging.getLogger("pdlaunch").setLevel(levels[1])
        logging.captureWarnings(False)
    line = json.loads(stream.getvalue())
    assert line["message"].startswith("200 /v1/completions")
    assert (line["request"]["id"], line["request"]["status"]) == ("r7", 200)
    assert line["request"]["prefill"] is None
