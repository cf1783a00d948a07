"""Requests go to the engines that report their KV blocks, and answers are right."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from tests.e2e.api import states
from tests.e2e.conftest import default_environ, launched
from tests.e2e.test_surroundings import ask
from tests.e2e.tiny_models import VOCAB_SIZE, greedy
from tests.e2e.waiting import await_true


def test_what_follows_goes_to_the_engine_that_has_the_answer(llama: Path) -> None:
    rng = random.Random(11)

    def drawn(number: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(number)]

    prompts = [drawn(300) for _ in range(6)]
    answers = greedy(llama, prompts, 8)
    nexts = [[*prompt, *answer, *drawn(6)] for prompt, answer in zip(prompts, answers, strict=True)]
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
        launch.processes()[f"{lost}/rank-0"].send_signal(signal.SIGKILL)
        await_true(lambda: states(launch.url).get(lost) != "ready", f"the death of {lost}")
        await_true(lambda: states(launch.url).get(lost) == "ready", f"the return of {lost}")
        route, tokens = ask(launch.url, nexts[4])
        assert tokens == next_answers[4]
        assert route.partition(";")[0] != lost
