"""An engine's counts, look by look, on a clock of the test."""

from __future__ import annotations

from pdlaunch.http.watch.engine_api import Counts
from pdlaunch.launch.sidecar.process import EngineHangWatch, Found

TIMEOUT_S = 60.0


class Looks:
    """Looks every two seconds."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.now_at = 1000.0
        self._watch = EngineHangWatch(timeout_s, lambda: self.now_at)

    def until(
        self, wanted: Found, *, num_tokens: int = 0, running: int = 0, is_probed: bool = False
    ) -> float:
        """Return the seconds after which it is judged so; a look more than it takes is too late."""
        counts = Counts(
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running {running}\n"
            "# TYPE vllm:generation_tokens counter\n"
            f"vllm:generation_tokens_total {num_tokens}\n"
        )
        began_at = self.now_at
        while self._watch.look(counts, is_probed=is_probed) != wanted:
            self.now_at += 2.0
            assert self.now_at - began_at < 10 * TIMEOUT_S
        return self.now_at - began_at


def test_work_without_progress_is_a_hang() -> None:
    looks = Looks()
    assert looks.until("works", num_tokens=1, running=1) == 0
    assert TIMEOUT_S < looks.until("hangs", num_tokens=1, running=1) <= TIMEOUT_S + 2


def test_progress_begins_the_time_anew() -> None:
    looks = Looks()
    for num_tokens in range(50):
        assert looks.until("works", num_tokens=num_tokens, running=1) == 0
        looks.now_at += TIMEOUT_S - 2
    assert looks.until("hangs", num_tokens=49, running=1) > 0


def test_an_idle_engine_is_probed_once_in_a_while_and_a_probe_is_work() -> None:
    looks = Looks()
    for _ in range(3):
        assert TIMEOUT_S < looks.until("idle") <= TIMEOUT_S + 2
    assert TIMEOUT_S < looks.until("hangs", is_probed=True) <= TIMEOUT_S + 2
