"""Keeps the queues of an engine's requests, each in order of arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import Literal

from pdlaunch.engine.request import Phase, Request
from pdlaunch.observe.spans import QUEUE
from pdlaunch.protocol.ids import RequestId

# The one order of an engine: who is seated first, whom a lack of blocks holds back, and who gives
# its blocks up (the last). Searches are binary, so a request's key must not change while it is
# queued, and no two may be equal.
_by_arrival = attrgetter("arrival")


class RequestQueues:
    """Holds requests from their arrival to their end; every move also sets ``Request.phase``."""

    def __init__(self) -> None:
        self.by_id: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []
        """Phases WAITING and READY."""
        self.running: list[Request] = []

    @property
    def num_waiting_for_kv(self) -> int:
        """Return how many requests are in neither queue, as a pull or a load has to end first."""
        return len(self.by_id) - len(self.waiting) - len(self.running)

    def add(self, request: Request) -> None:
        """Take a request that has arrived."""
        self.by_id[request.request_id] = request
        self.wait(request)

    def wait(
        self, request: Request, phase: Literal[Phase.WAITING, Phase.READY] = Phase.WAITING
    ) -> None:
        """Let a request that is in neither queue wait for a place in the batch."""
        request.phase = phase
        request.spans.enter(QUEUE)
        insort(self.waiting, request, key=_by_arrival)

    def run(self, request: Request) -> None:
        """Move a waiting request into the batch."""
        self._remove(self.waiting, request)
        request.phase = Phase.RUNNING
        request.spans.enter("run")
        request.spans.seated(**request.cached_tokens._asdict())
        insort(self.running, request, key=_by_arrival)

    def await_kv(self, request: Request, phase: Literal[Phase.LOADING, Phase.PULLING]) -> None:
        """Take a waiting request out of the queues until its blocks are there."""
        self._remove(self.waiting, request)
        request.phase = phase
        request.spans.enter(phase.value)

    def preempt(self, request: Request) -> None:
        """Let a running or ready request wait again."""
        if request.phase is Phase.RUNNING:
            self._remove(self.running, request)
            insort(self.waiting, request, key=_by_arrival)
        request.phase = Phase.WAITING
        request.spans.preempted()
        request.spans.enter(QUEUE)

    def end(self, request: Request) -> None:
        """Remove a request that has ended."""
        del self.by_id[request.request_id]
        if request.phase is Phase.RUNNING:
            self._remove(self.running, request)
        elif request.phase in (Phase.WAITING, Phase.READY):
            self._remove(self.waiting, request)
        request.phase = Phase.FINISHED

    def ready(self) -> list[Request]:
        """Return the requests that wait and own blocks."""
        return [request for request in self.waiting if request.phase is Phase.READY]

    def latest_owner(self) -> Request:
        """Return the latest arrival that owns blocks and waits for no connector; there is one."""
        return max(self.ready()[-1:] + self.running[-1:], key=_by_arrival)

    def check_integrity(self) -> None:
        """Prove that each request is where its phase says. Raises AssertionError."""
        places = {
            Phase.WAITING: self.waiting,
            Phase.READY: self.waiting,
            Phase.RUNNING: self.running,
        }
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_by_arrival)
        for request in self.by_id.values():
            assert request in places.get(request.phase, [request])
            assert (request.row is not None) == (request.phase is Phase.RUNNING)
            assert request.tables.end == 0 or request.phase in (Phase.READY, Phase.RUNNING)
        num_apart = sum(
            request.phase in (Phase.PULLING, Phase.LOADING) for request in self.by_id.values()
        )
        assert self.num_waiting_for_kv == num_apart

    @staticmethod
    def _remove(queue: list[Request], request: Request) -> None:
        place = bisect_left(queue, request.arrival, key=_by_arrival)
        assert queue[place] is request
        del queue[place]
