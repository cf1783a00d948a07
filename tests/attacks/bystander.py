"""A client that asks small questions while others attack: its answers must stay right and come in
time.
"""

from __future__ import annotations

import threading
import time

from tests.attacks.target import COMPLETIONS, SMALL_BODY, Answer, Target, text_of
from tests.attacks.verdict import Verdict

PAUSE_S = 0.2


class Bystander:
    """Asks from a thread of its own as long as the block runs, and watches how much memory the
    processes take meanwhile.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work), threading.Thread(target=self._watch)]
        self.answers: list[Answer] = []
        self.num_wrong = 0
        self.peak: dict[str, float] = {}

    def __enter__(self) -> Bystander:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def slowest_s(self) -> float:
        return max((answer.seconds for answer in self.answers), default=0.0)

    def judge(self, verdict: Verdict, how: str, *, limit_s: float) -> None:
        """Its answers are right, and none took longer than ``limit_s``."""
        for answer in self.answers:
            if promise := answer.broken_promise():
                verdict.broke(f"others are served: {promise}", how)
        if self.num_wrong:
            verdict.broke(
                "others get the right tokens",
                f"{how}: {self.num_wrong} of {len(self.answers)} answers are wrong",
            )
        if self.slowest_s > limit_s:
            verdict.broke(
                f"others are served within {limit_s:g} s",
                f"{how}: the slowest took {self.slowest_s:.1f} s",
            )

    def said(self) -> tuple[str, str]:
        """Of answers and of memory."""
        statuses = sorted({answer.status for answer in self.answers})
        peaks = " ".join(f"{name} {size:.0f}" for name, size in sorted(self.peak.items()))
        said = f"others {len(self.answers)} asked, {statuses}, slowest {self.slowest_s:.2f} s"
        return said, f"peak MiB {peaks}"

    def _work(self) -> None:
        while not self._stop.is_set():
            answer = self._target.ask("router", COMPLETIONS, SMALL_BODY, timeout_s=180)
            self.answers.append(answer)
            self.num_wrong += answer.status == 200 and text_of(answer) != self._target.reference
            self._stop.wait(PAUSE_S)

    def _watch(self) -> None:
        while not self._stop.is_set():
            for name, size in self._target.memory().items():
                self.peak[name] = max(self.peak.get(name, 0.0), size)
            time.sleep(PAUSE_S)
