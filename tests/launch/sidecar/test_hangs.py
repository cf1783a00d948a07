"""An engine's counts, look by look, on a clock of the test."""

from __future__ import annotations

import pytest

from pdlaunch.http.watch.engine_api import Counts
from pdlaunch.launch.sidecar.__main__ import EngineHangWatch, Found

TIMEOUT_S = 60.0


class Looks:
    def __init__(self) -> None:
        self.now_at = 1000.0
        self._watch = EngineHangWatch(TIMEOUT_S, lambda: self.now_at)

    def look(self, num_tokens: int, running: int, is_probed: bool) -> Found:
        counts = Counts(
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running {running}\n"
            "# TYPE vllm:generation_tokens counter\n"
            f"vllm:generation_tokens_total {num_tokens}\n"
        )
        return self._watch.look(counts, is_probed=is_probed)

    def after_s(self, wanted: Found, *, running: int = 0, is_probed: bool = False) -> float:
        """Return the seconds without progress after which it is judged so."""
        began_at = self.now_at
        while self.look(1, running, is_probed) != wanted:
            self.now_at += 2.0
            assert self.now_at - began_at < 10 * TIMEOUT_S
        return self.now_at - began_at


@pytest.mark.parametrize(
    ("running", "is_probed", "found"), [(1, False, "hangs"), (0, True, "hangs"), (0, False, "idle")]
)
def test_without_progress_it_hangs_or_is_idle_after_the_timeout_again_and_again(
    running: int, is_probed: bool, found: Found
) -> None:
    looks = Looks()
    for _ in range(3):
        took_s = looks.after_s(found, running=running, is_probed=is_probed)
        assert TIMEOUT_S < took_s <= TIMEOUT_S + 2


def test_progress_begins_the_time_anew() -> None:
    looks = Looks()
    for num_tokens in range(2, 50):
        assert looks.look(num_tokens, 1, is_probed=False) == "works"
        looks.now_at += TIMEOUT_S - 2
