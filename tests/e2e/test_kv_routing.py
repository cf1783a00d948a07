"""Requests go to the engines that report their KV blocks, and answers are right."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.e2e.conftest import default_environ, launched
from tests.e2e.test_surroundings import ask
from tests.e2e.tiny_models import greedy, make_prompts
from tests.labs.kills import kill_and_wait


def test_what_follows_goes_to_the_engine_that_has_the_answer(llama: Path) -> None:
    prompts, endings = make_prompts(11, [300] * 6), make_prompts(12, [6] * 6)
    answers = greedy(llama, prompts, 8)
    nexts = [a + b + c for a, b, c in zip(prompts, answers, endings, strict=True)]
    next_answers = greedy(llama, nexts, 8)
    with launched(llama, "--decode", "2", environ=default_environ()) as launch:
        holders = []
        for prompt, answer in zip(prompts, answers, strict=True):
            route, tokens = ask(launch.url, prompt)
            assert tokens == answer
            holders.append(route.partition(";")[0].rpartition("->")[2])
        assert {*holders} == {"decode-0", "decode-1"}
        # Only the first prompts: events of the last ones may not have arrived yet.
        for prompt, answer, holder in zip(nexts[:3], next_answers, holders, strict=False):
            route, tokens = ask(launch.url, prompt)
            assert route.partition(";")[0].rpartition("->")[2] == holder
            assert tokens == answer
        # A restarted engine has no blocks, and the router knows it.
        lost = holders[4]
        kill_and_wait(launch, f"{lost}/rank-0", signal.SIGKILL)
        route, tokens = ask(launch.url, nexts[4])
        assert tokens == next_answers[4]
        assert route.partition(";")[0] != lost
