"""Attacks that could not fail would prove nothing: what they take for a broken promise, without a
deployment.
"""

import pytest

from tests.attacks.sockets import REQUESTS, judge_http
from tests.attacks.target import Answer
from tests.attacks.verdict import Verdict


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
    ("who", "opened", "num_broken"),
    [
        ("decode-0", {}, 0),
        ("decode-0", {"GET /metrics": 200}, 1),
        ("decode-0", {"POST /v1/completions": 400, "POST /sleep?level=9": 400}, 2),
        # A router without a key serves, and does no more.
        ("router", {"POST /v1/completions": 200}, 0),
        ("router", {"POST /pdlaunch/release": 200}, 1),
    ],
)
def test_open_doors_are_told(who: str, opened: dict[str, int], num_broken: int) -> None:
    verdict = Verdict("sockets")
    judge_http(verdict, who, dict.fromkeys(REQUESTS, 401) | opened)
    assert len(verdict.broken) == num_broken
    assert verdict.conclude() == (num_broken > 0)
