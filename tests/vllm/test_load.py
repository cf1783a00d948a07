"""A pair of vLLM under load whose processes stand still or are killed, whose READs get lost, and
whose KV cache is too small: answers are those of one engine, and no block stays leased.
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.api import complete
from tests.e2e.client import Api, Deployment
from tests.e2e.faults import fault_variables, paused
from tests.e2e.tiny_models import VOCAB_SIZE
from tests.e2e.waiting import await_true
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import core_of, worker_of
from tests.vllm.test_models import Model
from tests.vllm.test_pair import await_healed, await_moving, is_idle
from tests.vllm.test_verified import Pair

pytestmark = pytest.mark.vllm_long

NUM_TOKENS = 12
CONCURRENCY = 6
LEASE_S = 8
PULL_TIMEOUT_S = 2
NUM_BLOCKS = 40
"""Of 32 tokens: four prompts and their answers fill the KV cache."""
FAULTS = {"seed": 5, "rate": 0.5, "slow_s": 0.5, "lost_s": 6}


def settings_of(model: Path, **transfer: object) -> dict[str, object]:
    return {
        "model": str(model),
        "dtype": "float32",
        "block_size": 32,
        "max_num_batched_tokens": 512,
        "engine_args": {"num-gpu-blocks-override": NUM_BLOCKS},
        "kv_transfer": {"lease_s": LEASE_S, "pull_timeout_s": PULL_TIMEOUT_S} | transfer,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Model("llama").written(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def launch(
    vllm_command: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("load")
    with running_engines(folder, vllm_command, settings_of(llama)) as deployment:
        yield deployment


def prompts(first_seed: int, count: int) -> list[list[int]]:
    draws = [random.Random(seed) for seed in range(first_seed, first_seed + count)]
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(200)] for draw in draws]


class Load:
    """Asks for an answer to each prompt, a few at a time, in the background."""

    def __init__(self, asked: list[list[int]], ask: Callable[[list[int]], list[int]]) -> None:
        self._pool = ThreadPoolExecutor(CONCURRENCY)
        self._answers: list[Future[list[int]]] = [self._pool.submit(ask, each) for each in asked]

    def await_answers(self, count: int) -> None:
        def num_done() -> int:
            return sum(each.done() for each in self._answers)

        await_true(lambda: num_done() >= count, lambda: f"{count} answers, not {num_done()}")

    def answers(self) -> list[list[int]]:
        with self._pool:
            return [each.result(300) for each in self._answers]


def handed_over(pair: Pair) -> Callable[[list[int]], list[int]]:
    """Send both legs of a request to the engines themselves, whatever is known of the pair."""
    return lambda prompt: pair.take(prompt, pair.hand_over(prompt))


def expected_of(
    alone: Api, asked: list[list[int]], num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    return [complete(alone, prompt, num_tokens) for prompt in asked]


def new_prompt() -> list[int]:
    return prompts(random.randrange(10**6, 10**9), 1)[0]


def await_calm(deployment: Deployment) -> None:
    """Wait until nothing is leased or pulled, and blocks of a new prompt move again."""
    await_true(lambda: is_idle(deployment), "no block is leased or in quarantine")
    await_moving(deployment.url, new_prompt)


def test_requests_that_are_preempted_are_computed_again(launch: Deployment) -> None:
    """The router would not send as many to decode at once."""
    asked = prompts(20, CONCURRENCY)
    pair = Pair(launch)
    expected = expected_of(pair.prefill, asked, 250)
    before = pair.decode.metrics()
    load = Load(asked, lambda prompt: pair.take(prompt, pair.hand_over(prompt), 250))
    assert load.answers() == expected
    after = pair.decode.metrics()
    preemptions = "vllm:num_preemptions_total"
    assert after[preemptions] > before[preemptions]
    await_calm(launch)


def test_prefill_stands_still_while_its_blocks_are_asked_for(launch: Deployment) -> None:
    """Pulls end by their time-out, and decode computes these prompts; others wait for prefill."""
    pair = Pair(launch)
    leased, others = prompts(40, 3), prompts(50, 24)
    expected = expected_of(pair.prefill, leased + others)
    params = [pair.hand_over(prompt) for prompt in leased]
    _, num_failed = pair.counts()
    load = Load(others, handed_over(pair))
    load.await_answers(3)
    with paused(pair.worker("prefill-0")):
        told = [pair.take(*each) for each in zip(leased, params, strict=True)]
    assert told + load.answers() == expected
    assert pair.counts()[1] >= num_failed + len(leased)
    await_calm(launch)


def test_decode_stands_still_for_longer_than_its_leases(launch: Deployment) -> None:
    pair = Pair(launch)
    asked = prompts(80, 30)
    expected = expected_of(pair.prefill, asked)
    load = Load(asked, handed_over(pair))
    load.await_answers(3)
    with paused(pair.worker("decode-0")):
        time.sleep(LEASE_S + 1)
    assert load.answers() == expected
    await_calm(launch)


@pytest.mark.parametrize(
    ("name", "victim"),
    [(name, victim) for name in ("prefill-0", "decode-0") for victim in (worker_of, core_of)],
)
def test_an_engine_is_killed_under_load(
    launch: Deployment, name: str, victim: Callable[[psutil.Process], psutil.Process]
) -> None:
    asked = prompts(120, 30)
    expected = expected_of(Pair(launch).prefill, asked)
    load = Load(asked, lambda prompt: complete(launch.url, prompt, NUM_TOKENS))
    load.await_answers(6)
    victim(launch.processes()[name]).kill()
    assert load.answers() == expected
    await_healed(launch.url, name, new_prompt)
    await_true(lambda: is_idle(launch), "no block is leased or in quarantine")


def test_lost_late_and_wrong_reads_change_no_token(
    vllm_command: str, llama: Path, tmp_path: Path
) -> None:
    """Half of the READs are refused, fail, bring wrong bytes, or end behind their pull's time-out:
    these blocks wait in quarantine.
    """
    asked = prompts(160, 40)
    settings, environ = settings_of(llama, pull_attempts=1), fault_variables(FAULTS)
    with running_engines(tmp_path, vllm_command, settings, environ=environ) as deployment:
        pair = Pair(deployment)
        expected = expected_of(pair.prefill, asked)
        assert Load(asked, handed_over(pair)).answers() == expected
        metrics = pair.decode.metrics()
        log = (deployment.log_dir / "decode-0.log").read_text()
        assert metrics["pdlaunch_kv_transfers_total"] > 0
        assert metrics["pdlaunch_kv_verification_failures_total"] > 0
        assert "READ was refused" in log
        assert "did not end within" in log
        await_true(lambda: is_idle(deployment), "no block is leased or in quarantine")
