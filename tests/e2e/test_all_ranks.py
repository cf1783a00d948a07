"""All ranks of a launch die at once, again and again: accepted requests are answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from pdlaunch.launch.client.deployment import running_deployment
from tests.e2e.api import complete
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import TINY
from tests.e2e.test_scale import states
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 100))
NUM_TOKENS = 16
NUM_ROUNDS = 3


def test_no_request_is_lost_when_all_ranks_die_at_once(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    (expected,) = greedy(model, [PROMPT], NUM_TOKENS)
    arguments = ("--model", str(model), "--prefill", "2", "--decode", "2", *TINY)
    with (
        running_deployment(arguments, environ=clean_environ()) as deployment,
        clients(deployment.url, expected) as num_answers,
    ):
        num_processes = len(deployment.processes())
        for _ in range(NUM_ROUNDS):
            wanted = num_answers() + 6
            for name, process in deployment.processes().items():
                if "/rank-" in name:
                    process.kill()
            await_true(lambda: len(deployment.processes()) == num_processes, "ranks are back")
            await_true(lambda: set(states(deployment).values()) == {"ready"}, "all are ready")
            await_true(lambda n=wanted: num_answers() >= n, "clients are answered again")


@contextmanager
def clients(url: str, expected: list[int]) -> Iterator[Callable[[], int]]:
    """Clients that ask until the block ends; each answer has to be the expected one."""
    ends, numbers = threading.Event(), count()
    answers: list[list[int]] = []

    def ask() -> None:
        while not ends.is_set():
            salt = str(next(numbers))
            answers.append(complete(url, PROMPT, NUM_TOKENS, cache_salt=salt))

    with ThreadPoolExecutor(6) as pool:
        works = [pool.submit(ask) for _ in range(6)]
        try:
            yield lambda: len(answers)
        finally:
            ends.set()
        for work in works:
            work.result()
    assert all(answer == expected for answer in answers)
