"""What ``pdlaunch smoke --chaos`` reports of requests that went wrong."""

from __future__ import annotations

from collections import Counter

from pdlaunch.bench.chaos import wrong_answers
from pdlaunch.bench.known_answers import SentRequest, SoakReport


def test_it_says_how_many_and_when_but_neither_prompt_nor_answer() -> None:
    report = SoakReport(
        outcomes=Counter(equal=1, wrong=1, error=1),
        sent=[
            SentRequest("equal", 0.0, 1.0, 0.5),
            SentRequest("wrong", 1.0, 2.5, 0.5),
            SentRequest("error", 1.0, 3.0, 0.5),
        ],
        details=["request 1: wrong after 1.5 s: {'prompt': 'a secret'}"],
    )
    said = "1 wrong; 1 error; wrong after 1.5 s; error after 2.0 s"
    assert wrong_answers(report, exact=True) == said
    # In other dtypes greedy answers may differ.
    assert wrong_answers(report, exact=False) == "1 error; error after 2.0 s"
    assert wrong_answers(SoakReport(outcomes=Counter(equal=9)), exact=True) is None
