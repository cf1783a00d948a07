"""An engine's counts, look by look, on a clock of the test."""

import pytest

from pdlaunch.http.engine_calls import Counts
from pdlaunch.launch.sidecar.__main__ import EngineHangWatch, Found
from tests.clock import FakeClock

TIMEOUT_S = 60.0


def counts(num_tokens: int, running: int) -> Counts:
    return Counts(
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running {running}\n"
        "# TYPE vllm:generation_tokens counter\n"
        f"vllm:generation_tokens_total {num_tokens}\n"
    )


@pytest.mark.parametrize(
    ("running", "is_probed", "found"), [(1, False, "hangs"), (0, True, "hangs"), (0, False, "idle")]
)
def test_without_progress_it_hangs_or_is_idle_after_the_timeout_again_and_again(
    running: int, is_probed: bool, found: Found
) -> None:
    clock = FakeClock()
    watch = EngineHangWatch(TIMEOUT_S, clock)
    for _ in range(3):
        began_at = clock.now
        while watch.look(counts(1, running), is_probed=is_probed) != found:
            clock.now += 2
            assert clock.now - began_at < 10 * TIMEOUT_S
        assert TIMEOUT_S < clock.now - began_at <= TIMEOUT_S + 2


def test_progress_begins_the_time_anew() -> None:
    clock = FakeClock()
    watch = EngineHangWatch(TIMEOUT_S, clock)
    for num_tokens in range(2, 50):
        assert watch.look(counts(num_tokens, 1), is_probed=False) == "works"
        clock.now += TIMEOUT_S - 2
