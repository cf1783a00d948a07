"""A deployment on a GPU sleeps and wakes up: it frees memory, answers with the same tokens, and
pulls blocks instead of recomputing them.
"""

from pathlib import Path

import pytest
import torch

from pdlaunch.launch.client.api import command_engines
from tests.e2e.api import complete, greedy_body, total_now
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.conftest import launched
from tests.e2e.waiting import await_true

pytest.importorskip("cuda.bindings")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPT = list(range(40, 100))


def pulled_bytes(url: str) -> float:
    return total_now(url, "kv_transfer_bytes")


def free_bytes() -> int:
    """The free memory of all devices, since engines use all of them."""
    return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))


def fds_of_ranks(deployment: Deployment) -> dict[str, int]:
    return {
        name: process.num_fds()
        for name, process in deployment.processes().items()
        if "/rank-" in name
    }


def test_engines_sleep_and_wake_up_ten_times_and_leak_nothing(llama: Path) -> None:
    with launched(
        llama, "--device", "cuda", "--kv-cache-memory", "4GiB", "--enable-sleep-mode"
    ) as deployment:
        url, admin = deployment.url, admin_api(deployment.url)
        expected = complete(url, PROMPT, 16, cache_salt="before")
        settled_bytes, settled_fds = 0, {}
        for cycle, level in enumerate((1, 2) * 5):
            awake_bytes = free_bytes()
            outcomes = command_engines(admin, "/sleep", level=level, mode="wait")
            assert [(outcome.is_sleeping, outcome.error) for outcome in outcomes] == [
                (True, None)
            ] * 2
            wanted_bytes = 0.95 * sum(outcome.num_bytes for outcome in outcomes)
            assert wanted_bytes > 2**32
            # A peer that maps the memory unmaps it after the next registry.
            await_true(
                lambda awake=awake_bytes, wanted=wanted_bytes: free_bytes() - awake >= wanted,
                "the memory is given back",
                30,
            )
            assert Api(url).post("/v1/completions", greedy_body(PROMPT, 16))[0] == 503
            assert not any(outcome.error for outcome in command_engines(admin, "/wake_up"))
            before = pulled_bytes(url)
            assert complete(url, PROMPT, 16, cache_salt=f"cycle {cycle}") == expected
            await_true(lambda before=before: pulled_bytes(url) > before, "the blocks are pulled")
            if cycle == 2:  # the first cycle of each level loads kernels
                settled_bytes, settled_fds = free_bytes(), fds_of_ranks(deployment)
        assert len(settled_fds) == 2
        await_true(
            lambda: free_bytes() >= settled_bytes,
            f"{settled_bytes} bytes are free as after the third cycle",
            30,
        )
        await_true(
            lambda: all(
                found <= settled_fds[name] for name, found in fds_of_ranks(deployment).items()
            ),
            f"no more files are open than after the third cycle: {settled_fds}",
            30,
        )
