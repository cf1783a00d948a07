"""What ``pdlaunch smoke --chaos`` reports of requests that went wrong."""

from __future__ import annotations

from pdlaunch.bench.chaos import SentRequest, wrong_answers


def test_it_says_how_many_and_when_but_neither_prompt_nor_answer() -> None:
    sent = [SentRequest("equal", 1.0), SentRequest("wrong", 1.5), SentRequest("error", 2.0)]
    said = "1 wrong; 1 error; wrong after 1.5 s; error after 2.0 s"
    assert wrong_answers(sent, exact=True) == said
    # In other dtypes greedy answers may differ.
    assert wrong_answers(sent, exact=False) == "1 error; error after 2.0 s"
    assert wrong_answers(sent[:1], exact=True) is None
