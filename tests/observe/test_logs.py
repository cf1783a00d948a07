import asyncio
import io
import json
import logging
import re

import pytest

from pdlaunch.observe.logs import request_logging, setup_logging

HOSTILE = "a\nFAKE 200\x1b[2J\x07\x9b31m[red]b[/red]\u202eevil\u2028\x00\ud800"
LOGGER = logging.getLogger("pdlaunch.engine.server")


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_line_has_time_level_process_and_request(stream: io.StringIO) -> None:
    setup_logging("prefill-0", "info", stream=stream)
    with request_logging("r1"):
        LOGGER.info("hello %d", 5)
    LOGGER.debug("not shown")
    logging.getLogger("library").info("not shown")
    line = (
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO prefill-0 "
        r"pdlaunch\.engine\.server \[r1\] hello 5\n"
    )
    assert re.fullmatch(line, stream.getvalue())


async def test_concurrent_requests_keep_their_ids_apart(stream: io.StringIO) -> None:
    setup_logging("a", "info", stream=stream)
    met = asyncio.Barrier(2)

    async def serve(request_id: str) -> None:
        with request_logging(request_id):
            await met.wait()
            LOGGER.info("from %s", request_id)

    await asyncio.gather(serve("r1"), serve("r2"))
    assert "[r1] from r1" in stream.getvalue()
    assert "[r2] from r2" in stream.getvalue()


def test_hostile_names_stay_on_their_line(stream: io.StringIO) -> None:
    setup_logging("router", "info", stream=stream)
    LOGGER.info("model %s", HOSTILE)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert r"a\nFAKE 200\x1b[2J\x07\x9b31m[red]b[/red]\u202eevil\u2028\x00\ud800" in line
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        LOGGER.exception("failed")
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))


def test_json_lines_hold_the_same_and_more(stream: io.StringIO) -> None:
    setup_logging("router", "info", form="json", stream=stream)
    with request_logging("r1"):
        LOGGER.info(HOSTILE, extra={"fields": lambda: {"request": {"status": 200}}})
    try:
        raise KeyError("x")
    except KeyError:
        LOGGER.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "INFO",
        "process": "router",
        "logger": "pdlaunch.engine.server",
        "message": HOSTILE,
        "request_id": "r1",
        "request": {"status": 200},
    }
    assert "KeyError: 'x'" in second["exception"]
