"""Steps that were launched and not collected yet, and what their requests keep until then.

    step N     launch ──────────── collect, postprocess
    step N+1                launch ──────────────────── collect, postprocess

A request that ends while a step computes it keeps its row and its blocks: the step still writes to
them. They are given back when the last such step has been collected; what it drew for the request
is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pdlaunch.engine.request import Phase, Request
from pdlaunch.engine.step import ScheduledRow, StepPlan


class StepsInFlight:
    """Remembers launched steps and their requests; oldest first, at most two."""

    def __init__(self) -> None:
        self._steps: deque[tuple[StepPlan, list[Request]]] = deque()
        self._ended: dict[Request, None] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, plan: StepPlan, requests: list[Request]) -> None:
        """Note a launched step for ``requests``, those of ``plan.scheduled`` in their order.

        A plan that computes nothing is not in flight.
        """
        if not plan.scheduled:
            return
        self._steps.append((plan, requests))
        for item, request in zip(plan.scheduled, requests, strict=True):
            request.num_in_flight += item.num_tokens
            request.num_unknown += item.sample
            if request.spans.wants_steps:
                request.spans.launched()

    def collect(self, plan: StepPlan) -> Iterator[tuple[ScheduledRow, Request]]:
        """Take the oldest step out: yield what it computed and for which request.

        Each request's counts are already without this step.
        """
        if not plan.scheduled:
            return
        oldest, requests = self._steps.popleft()
        assert oldest is plan
        for item, request in zip(plan.scheduled, requests, strict=True):
            request.num_in_flight -= item.num_tokens
            request.num_unknown -= item.sample
            yield item, request

    def marks(self) -> list[int]:
        """Return the marks of all requests in these steps, for the record that outlives the
        rank.
        """
        return [request.mark for _, requests in self._steps for request in requests]

    def keep(self, request: Request) -> bool:
        """Return whether a request that ends has to keep its row and blocks until ``is_free``."""
        if request.num_in_flight:
            self._ended[request] = None
        return request.num_in_flight > 0

    def is_free(self, request: Request) -> bool:
        """Return True, once for each request kept, when no step computes it any more."""
        if request.num_in_flight or request not in self._ended:
            return False
        del self._ended[request]
        return True

    def ended(self) -> Iterator[Request]:
        """Return the requests that have ended and still own a row and blocks."""
        return iter(self._ended)

    def check_integrity(self, living: set[Request]) -> None:
        """Prove that the counts of all requests are those of the steps. Raises AssertionError."""
        in_flight: dict[Request, int] = {}
        unknown: dict[Request, int] = {}
        for plan, requests in self._steps:
            for item, request in zip(plan.scheduled, requests, strict=True):
                in_flight[request] = in_flight.get(request, 0) + item.num_tokens
                unknown[request] = unknown.get(request, 0) + item.sample
        for request in living | self._ended.keys():
            assert request.num_in_flight == in_flight.get(request, 0)
            assert request.num_unknown == unknown.get(request, 0)
            assert not request.num_in_flight or request.row is not None
        assert in_flight.keys() <= living | self._ended.keys()
        assert all(
            request.phase is Phase.FINISHED and request.num_in_flight for request in self._ended
        )
