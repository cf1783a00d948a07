"""Records the life of one request in rank 0: where it waits, what brings its blocks, its steps.

::

    queue │ lease │ pull │ queue │ prefill │ prefill │ first decode step │ decode
          └─ the ranks' READs and proofs ─┘

Steps are recorded until the first one that decodes has ended; the rest is one span, so that a
token costs nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pdlaunch.observe.spans import PREFILL, PULL, QUEUE, SEATED, SpanLog, SpanReport
from pdlaunch.protocol.transfer import PullFinished

RANK = "rank-{}"
"""Names the process of a rank within its engine."""


class RequestSpans:
    """Records one request; nothing where nobody ``asked``."""

    def __init__(self, asked: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.wants_steps = asked
        """The next step of the request is to be recorded."""
        self._log = SpanLog(clock) if asked else None
        self._phase = QUEUE
        self._phase_at = 0.0 if self._log is None else self._log.start_at
        self._launched_at: deque[float] = deque()
        """Instants of the steps in flight, the oldest first."""
        self._decodes_since_at: float | None = None
        self._has_reported = False

    def enter(self, phase: str) -> None:
        """Note that the request waits for something else now, or computes."""
        log = self._log
        if log is None or phase == self._phase:
            return
        now_at = log.clock()
        if self._phase == QUEUE:
            log.add(QUEUE, self._phase_at, now_at)
        self._phase, self._phase_at = phase, now_at

    def seated(self, *, device: int, host: int, remote: int) -> None:
        """Note that the request is in the batch, and what of its prompt it need not compute."""
        if self._log is not None:
            self._log.mark(SEATED, device_tokens=device, host_tokens=host, remote_tokens=remote)

    def preempted(self) -> None:
        """Note that the request has lost its blocks and computes them again."""
        if self._log is not None:
            self._log.mark("preempted")
            self.wants_steps, self._decodes_since_at = True, None

    def loaded(self, *, ok: bool, num_tokens: int) -> None:
        """Note that blocks have come from host memory, or have not."""
        if self._log is not None:
            self._log.add("load from host", self._phase_at, None, ok=ok, tokens=num_tokens)

    def pulled(self, event: PullFinished, *, num_tokens: int, verifies: bool) -> None:
        """Note the end of the request's pull, and what the ranks tell of it."""
        log = self._log
        if log is None:
            return
        asked_at, now_at = self._phase_at, log.clock()
        start_at = max(asked_at, now_at - event.seconds)
        log.add("lease", asked_at, start_at)
        log.add(
            PULL,
            start_at,
            now_at,
            bytes=event.num_bytes,
            gb_s=round(event.num_bytes / event.read_s / 1e9, 3) if event.read_s else None,
            verified=event.ok and verifies,
            tokens=num_tokens if event.ok else 0,
            retries=event.num_retries,
            error=event.error or None,
        )
        for tp_rank, report in event.reports.items():
            log.take(report, sent_at=asked_at, received_at=now_at, process=RANK.format(tp_rank))

    def leased(self, lease_s: float, num_blocks: int) -> None:
        """Note that the prompt's blocks can be pulled from here."""
        if self._log is not None:
            self._log.mark("lease granted", seconds=lease_s, blocks=num_blocks)

    def launched(self) -> None:
        """Note that a step begins to compute the request, while ``wants_steps``."""
        if self._log is not None:
            self._launched_at.append(self._log.clock())

    def computed(self, num_tokens: int, *, of_prompt: bool, step_id: int) -> None:
        """Note the end of the oldest step that was launched."""
        log = self._log
        if log is None or not self._launched_at:
            return
        start_at, now_at = self._launched_at.popleft(), log.clock()
        if of_prompt:
            log.add(PREFILL, start_at, now_at, tokens=num_tokens, step=step_id)
        else:
            log.add("first decode step", start_at, now_at, step=step_id)
            self.wants_steps, self._decodes_since_at = False, now_at
            # The next step may be in flight already: it is part of the span of the rest.
            self._launched_at.clear()

    def first_report(self) -> SpanReport | None:
        """Return what goes with the first output; None if that has gone, or nobody asked."""
        return None if self._has_reported else self._report()

    def end(self, reason: str, num_tokens: int) -> SpanReport | None:
        """Note the end; return all that has not been reported."""
        log = self._log
        if log is None:
            return None
        self.enter("")
        now_at = log.clock()
        if self._decodes_since_at is not None:
            log.add("decode", self._decodes_since_at, now_at, tokens=num_tokens)
        log.add("end", now_at, now_at, reason=reason, tokens=num_tokens)
        return self._report()

    def _report(self) -> SpanReport | None:
        log, self._has_reported = self._log, True
        if log is None:
            return None
        report = log.report(RANK.format(0))
        log.spans.clear()
        log.num_dropped = 0
        return report
