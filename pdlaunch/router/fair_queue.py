"""Queues prompts that no engine can begin yet, and shares the engines among the API keys.

::

    key A: ▇▇▇▇ ▇▇▇▇ ▇▇▇▇ ─┐
    key B: ▇ ──────────────┴─▶ the key with the fewest tokens for its weight ──▶ choose, prefill, ..

This is deficit round robin with a quantum of one token, also known as a virtual token counter. A
key without waiting prompts starts at the count of the others, without debt or credit.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024).
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

from pdlaunch.router.engine import EngineKey
from pdlaunch.router.policy import RoutingRequest

T = TypeVar("T")
_MOST_CHOICES = 8  # at most this many routes are chosen in one call of ``take``, to save CPU time


class Flow(Generic[T]):
    """Holds the waiting items of one key. ``tokens``: its tokens so far, divided by its weight."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.tokens = 0.0
        self.last_turn = 0
        # Lower priorities first, as in vLLM, then in the order of arrival.
        self.waiting: list[tuple[int, int, int, T]] = []


class FairQueue(Generic[T]):
    """Orders items of several flows by the tokens that each flow has used. Does not wait."""

    def __init__(self) -> None:
        self._flows: list[Flow[T]] = []  # flows with waiting items
        self._now = 0.0  # the minimum tokens of the waiting flows before the last ``pop``
        self._numbers = itertools.count(1)

    def push(self, flow: Flow[T], item: T, num_tokens: int, priority: int = 0) -> None:
        if not flow.waiting:
            flow.tokens = max(flow.tokens, self._now)
            self._flows.append(flow)
        heapq.heappush(flow.waiting, (priority, next(self._numbers), num_tokens, item))

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for flow in self._flows for _, _, num_tokens, _ in flow.waiting)

    def by_turn(self) -> list[Flow[T]]:
        """Return the flows with waiting items, the next one first."""
        return sorted(self._flows, key=lambda flow: (flow.tokens, flow.last_turn))

    def pop(self, flow: Flow[T]) -> T:
        """Remove and return the first item of a flow, and charge the flow for it."""
        _, _, num_tokens, item = heapq.heappop(flow.waiting)
        self._now = min(each.tokens for each in self._flows)
        flow.last_turn = next(self._numbers)
        flow.tokens += num_tokens / flow.weight
        self._drop_empty(flow)
        return item

    def answered(self, flow: Flow[T], num_tokens: int) -> None:
        """Charge a flow for an answer's tokens, unless no other prompts wait."""
        if self._flows:
            flow.tokens += num_tokens / flow.weight

    def remove(self, flow: Flow[T], item: T) -> None:
        """Remove a cancelled item, if it is still in the queue."""
        flow.waiting = [each for each in flow.waiting if each[3] is not item]
        heapq.heapify(flow.waiting)
        self._drop_empty(flow)

    def _drop_empty(self, flow: Flow[T]) -> None:
        if not flow.waiting and flow in self._flows:
            self._flows.remove(flow)


Turn = tuple[RoutingRequest, asyncio.Future[None]]


class Turns:
    """Makes the prompts of several keys wait for their turn.

    ``can_begin`` returns whether an engine would begin a prompt now. If not, it adds the engine
    that the prompt waits for to its second argument. ``is_fair``: there are several keys.
    """

    def __init__(
        self, can_begin: Callable[[RoutingRequest, set[EngineKey]], bool], *, is_fair: bool
    ) -> None:
        self._can_begin = can_begin
        self.is_fair = is_fair
        self.queue = FairQueue[Turn]()
        self._is_beginning = False  # a prompt has its turn, but its engine does not count it yet

    async def wait(self, flow: Flow[Turn], request: RoutingRequest, priority: int) -> None:
        """Wait until an engine would begin the prompt now and no other key comes first.

        The caller must give the prompt to an engine before it awaits anything else.
        """
        loop = asyncio.get_running_loop()
        turn = (request, loop.create_future())
        self.queue.push(flow, turn, request.num_prompt_tokens, priority)
        self.take()
        try:
            await turn[1]
        except asyncio.CancelledError:
            self.queue.remove(flow, turn)
            # Other prompts may have waited behind this one.
            loop.call_soon(self.take)
            raise

    def take(self) -> None:
        """Let the next prompt go that an engine would begin. Call this when engines get room.

        While a prompt waits for one engine, later prompts may go to other engines.
        """
        if self._is_beginning:
            return
        reserved = set[EngineKey]()
        for flow in self.queue.by_turn()[:_MOST_CHOICES]:
            request, future = flow.waiting[0][3]
            # A future that is done was cancelled; ``wait`` removes it soon.
            if future.done():
                return
            if self._can_begin(request, reserved):
                self.queue.pop(flow)
                future.set_result(None)
                # Callbacks run in order: ``_advance`` runs after the prompt has its engine.
                self._is_beginning = True
                asyncio.get_running_loop().call_soon(self._advance)
                return

    def _advance(self) -> None:
        self._is_beginning = False
        self.take()
