"""Attacks that could not fail would prove nothing: what they take for a broken promise, without a
deployment.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.attacks.sockets import judge_port
from tests.attacks.stranger import REQUESTS
from tests.attacks.target import Answer
from tests.attacks.verdict import Verdict

REFUSED = dict.fromkeys(REQUESTS, 401)
RANK = "decode-0/rank-0"
CURVE = (b"\xff" + b"\0" * 8 + b"\x7f\x03\x01CURVE").hex()


@pytest.mark.parametrize(
    ("status", "headers", "body", "promise"),
    [
        (200, {}, b"{}", None),
        (400, {}, b"{}", None),
        (503, {"retry-after": "1"}, b"{}", None),
        (503, {}, b"{}", "no 5xx but 503 with Retry-After: 503"),
        (500, {"retry-after": "1"}, b"{}", "no 5xx but 503 with Retry-After: 500"),
        (504, {}, b"{}", "no 5xx but 503 with Retry-After: 504"),
        (0, {}, b"TimeoutError: ", "a request is answered: TimeoutError: "),
        (400, {}, b"Traceback (most recent call last):", "an answer shows no traceback"),
        (200, {}, b'{"logprob": NaN}', "an answer is JSON: NaN or Infinity"),
    ],
)
def test_answers_are_judged(
    status: int, headers: dict[str, str], body: bytes, promise: str | None
) -> None:
    assert Answer(status, body, 0.1, headers).broken_promise() == promise


@pytest.mark.parametrize(
    ("found", "broken", "name"),
    [
        ({"statuses": REFUSED}, 0, RANK),
        ({"statuses": REFUSED | {"GET /metrics": 200}}, 1, RANK),
        (
            {"statuses": REFUSED | {"POST /v1/completions": 400, "POST /sleep?level=9": 400}},
            2,
            RANK,
        ),
        ({"zmq": CURVE, "http": ""}, 0, RANK),
        ({"zmq": CURVE.replace(b"CURVE".hex(), b"NULL\0".hex()), "http": ""}, 1, RANK),
        ({"zmq": "", "ucx": "", "http": ""}, 1, RANK),
        ({"error": "ConnectionResetError"}, 1, RANK),
        # A router without a key serves, and does no more.
        ({"statuses": REFUSED | {"POST /v1/completions": 200}}, 0, "router"),
        ({"statuses": REFUSED | {"POST /pdlaunch/release": 200}}, 1, "router"),
    ],
)
def test_ports_are_judged(
    found: dict[str, Any], broken: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = Verdict("sockets")
    judge_port(verdict, name, {"port": 1} | found, is_router=name == "router")
    assert len(verdict.broken) == broken
    assert verdict.conclude() == (1 if broken else 0)
