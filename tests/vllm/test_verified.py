"""What goes wrong with vLLM's own connector, and does not with ours: the real programs.

Both pairs get the same treatment. Wrong answers of the stock one show that the treatment works.
"""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from pdlaunch.http.canary import REMOTE_DECODE
from tests.e2e.api import complete
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.waiting import await_true
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import (
    BYTES_READ,
    EXPIRED,
    FAILED,
    core_of,
    flip_bit,
    total,
    worker_of,
)

NUM_TOKENS = 12
LEASE_S = 8
BLOCK_SIZE = 32
NUM_BLOCKS = 40
"""Four prompts fill the KV cache, so that blocks are soon used again."""
PROMPT_TOKENS = 300
STEP_TOKENS = 256
"""A prompt takes two steps; a longer step would need a longer lease (PD619)."""
ANSWERS = "vllm:request_success_total"


@pytest.fixture(
    scope="module", params=["verified", pytest.param("stock", marks=pytest.mark.vllm_long)]
)
def launch(
    request: pytest.FixtureRequest, vllm_command: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Deployment]]:
    """One pair, with our connector and then with vLLM's."""
    connector = "nixl" if request.param == "verified" else "vllm-nixl"
    settings = {
        "engine_args": {"num-gpu-blocks-override": NUM_BLOCKS},
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": STEP_TOKENS,
        "kv_transfer": {"lease_s": LEASE_S, "pull_timeout_s": LEASE_S - 2, "connector": connector},
    }
    folder = tmp_path_factory.mktemp("verified")
    with running_engines(folder, vllm_command, settings) as deployment:
        yield request.param, deployment


class Pair:
    """Sends the two legs of a request itself, with time in between."""

    def __init__(self, deployment: Deployment) -> None:
        admin = admin_api(deployment.url)
        self.prefill, self.decode = admin.engine("prefill-0"), admin.engine("decode-0")
        self._deployment = deployment

    def worker(self, name: str) -> psutil.Process:
        return worker_of(self._deployment.processes()[name])

    def hand_over(self, prompt: list[int]) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": REMOTE_DECODE,
        }
        status, answer = self.prefill.post("/v1/completions", body)
        assert status == 200, answer
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params

    def take(
        self, prompt: list[int], params: dict[str, Any], num_tokens: int = NUM_TOKENS
    ) -> list[int]:
        return complete(self.decode, prompt, num_tokens, kv_transfer_params=params)

    def await_hashes(self, prompt: list[int]) -> None:
        """Prefill hashes blocks in the step after its answer: those of this lease come later."""
        self.take(prompt[::-1], self.hand_over(prompt[::-1]))

    def counts(self) -> tuple[float, float]:
        """Return bytes read and failed loads of the decode engine."""
        metrics = self.decode.metrics()
        return total(metrics, BYTES_READ), total(metrics, FAILED)


def prompt_of(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]


def test_an_expired_lease_whose_blocks_were_used_again(launch: tuple[str, Deployment]) -> None:
    connector, deployment = launch
    pair = Pair(deployment)
    prompt = prompt_of(100)
    num_expired = total(pair.prefill.metrics(), EXPIRED)
    params = pair.hand_over(prompt)
    time.sleep(LEASE_S + 0.5)
    for seed in range(101, 106):
        complete(pair.prefill, prompt_of(seed), 1)
    assert total(pair.prefill.metrics(), EXPIRED) > num_expired
    _, num_failed = pair.counts()
    told = pair.take(prompt, params)
    is_right = told == complete(pair.prefill, prompt, NUM_TOKENS)
    # The stock one answers with tokens of other prompts, and counts no failure.
    assert is_right == (connector == "verified")
    # A canary that follows, as the pair is in doubt, may fail too where the machine is slow.
    assert (pair.counts()[1] > num_failed) == (connector == "verified")


def test_a_request_whose_lease_ends_on_its_way_through_the_router(
    launch: tuple[str, Deployment],
) -> None:
    """Decode stands still for longer than the lease, and prefill uses the blocks again."""
    connector, deployment = launch
    pair = Pair(deployment)
    router = Api(deployment.url)
    # Of failed READs before this the pair may be in doubt.
    await_true(lambda: bool(shown(router, "pairs")), "the pair is proven")
    prompt = prompt_of(30)
    expected = complete(pair.prefill, prompt, NUM_TOKENS)
    num_answers = pair.prefill.metrics()[ANSWERS]
    core = core_of(deployment.processes()["decode-0"])
    told: list[list[int]] = []
    client = threading.Thread(target=lambda: told.append(complete(router, prompt, NUM_TOKENS)))
    core.suspend()
    try:
        client.start()
        await_true(lambda: pair.prefill.metrics()[ANSWERS] > num_answers, "prefill is done")
        time.sleep(LEASE_S + 0.5)
        for seed in range(31, 36):
            complete(pair.prefill, prompt_of(seed), 1)
    finally:
        core.resume()
    client.join(300)
    assert (told == [expected]) == (connector == "verified")
    count = router.metrics().get("pdlaunch_router_silent_recomputes_total", 0)
    if connector == "stock":
        return  # it has read blocks, and nothing tells that they were others'
    # Found at once, counted, named; and nothing is wrong with the pair.
    assert count == 1
    log = (deployment.log_dir / "router.log").read_text()
    assert "prefill-0 -> decode-0: decode computed" in log
    assert "has no lease here" in (deployment.log_dir / "decode-0.log").read_text()
    assert shown(router, "pairs"), "the pair stays proven"
    num_bytes, _ = pair.counts()
    assert complete(router, prompt_of(37), NUM_TOKENS)
    assert pair.counts()[0] > num_bytes


def shown(router: Api, name: str) -> Any:
    return router.get_object("/pdlaunch/status")[1][name]


def test_a_bit_that_flips_after_the_answer(launch: tuple[str, Deployment]) -> None:
    connector, deployment = launch
    pair = Pair(deployment)
    wrong = 0
    for seed in range(20, 22):
        prompt = prompt_of(seed)
        expected = complete(pair.prefill, prompt, NUM_TOKENS)
        params = pair.hand_over(prompt)
        pair.await_hashes(prompt)
        for block in range(len(params["remote_block_ids"][0])):
            log = (deployment.log_dir / "prefill-0.log").read_text()
            flip_bit(params, pair.worker("prefill-0"), log, block)
        num_bytes, num_failed = pair.counts()
        wrong += pair.take(prompt, params) != expected
        after = pair.counts()
        # Ours counts the bytes that it has proven.
        assert after[0] > num_bytes or connector == "verified"
        assert (after[1] > num_failed) == (connector == "verified")
    assert wrong == 0 if connector == "verified" else wrong > 0
    said = "pulled KV blocks are used without proof: kv_transfer.connector is vllm-nixl"
    log = (deployment.log_dir / "decode-0.log").read_text()
    assert (said in log) == (connector == "stock")
