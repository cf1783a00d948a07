"""Identifies clients by their API keys, enforces the limits of each key, and shares the engines.

Prompts that no engine can begin yet wait in a queue::

    key A: ▇▇▇▇ ▇▇▇▇ ▇▇▇▇ ─┐
    key B: ▇ ──────────────┴─▶ the key with the fewest tokens for its weight ──▶ choose, prefill, ..

This is deficit round robin with a quantum of one token, also known as a virtual token counter. A
key without waiting prompts starts at the count of the others, without debt or credit.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024).
"""

import asyncio
import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import bearer_token
from pdlaunch.protocol.process.bootstrap import ClientKey
from pdlaunch.router.engine import EngineKey
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.policy import RoutingRequest

T = TypeVar("T")
_MOST_CHOICES = 8  # at most this many routes are chosen in one call of ``take``, to save CPU time
_CLIENT = web.RequestKey("client", object)
_MINUTE_S = 60.0


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
        return sorted(self._flows, key=lambda flow: (flow.tokens, flow.last_turn))

    def pop(self, flow: Flow[T]) -> T:
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
        flow.waiting = [each for each in flow.waiting if each[3] is not item]
        heapq.heapify(flow.waiting)
        self._drop_empty(flow)

    def _drop_empty(self, flow: Flow[T]) -> None:
        if not flow.waiting and flow in self._flows:
            self._flows.remove(flow)


Turn = tuple[RoutingRequest, asyncio.Future[None]]


@dataclass(eq=False)
class Turns:
    """Makes the prompts of several keys (``is_fair``) wait for their turn."""

    # Returns whether an engine would begin a prompt now; if not, adds it to the set.
    _can_begin: Callable[[RoutingRequest, set[EngineKey]], bool]
    is_fair: bool

    def __post_init__(self) -> None:
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
        """Let the next prompt go that an engine would begin. Call this when engines get room."""
        if self._is_beginning:
            return
        # While a prompt waits for one engine, later prompts may go to other engines.
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


class Client:
    """Counts the running prompts of one key, and the tokens that it may still use.

    The tokens refill evenly over a minute. A request may overdraw them; later requests are refused
    until they are positive again.
    """

    def __init__(self, key: ClientKey, metrics: RouterMetrics, clock: Callable[[], float]) -> None:
        self.name = key.name
        self.flow = Flow[Turn](key.weight)
        self.num_running = 0
        self._key = key
        self._metrics = metrics
        self._clock = clock
        self._left = float(key.tokens_per_minute or 0)
        # For each running request: a function that returns the charged tokens not used so far
        self._unused: list[Callable[[], int]] = []
        self._counted_at = clock()
        for name in ("requests", "prompt_tokens", "generation_tokens", "queue_seconds"):
            self._count(f"key_{name}", by=0)
        for limit in ("max_concurrent", "tokens_per_minute"):
            self._count("key_refusals", limit, by=0)

    @contextmanager
    def admit(
        self, num_prompts: int, num_tokens: int, used: Callable[[], tuple[int, int]]
    ) -> Iterator[None]:
        """Count a request while the block runs. Raises OverloadedError (429).

        ``num_tokens`` is charged at once; ``used`` returns the real numbers at the end.
        """
        self._check(num_prompts)
        self._count("key_requests")
        self.num_running += num_prompts
        self._left -= num_tokens

        def unused() -> int:
            return num_tokens - sum(used())

        self._unused.append(unused)
        try:
            yield
        finally:
            self.num_running -= num_prompts
            self._unused.remove(unused)
            num_prompt_tokens, num_output_tokens = used()
            self._left += num_tokens - num_prompt_tokens - num_output_tokens
            self._count("key_prompt_tokens", by=num_prompt_tokens)
            self._count("key_generation_tokens", by=num_output_tokens)

    def waited(self, seconds: float) -> None:
        self._count("key_queue_seconds", by=seconds)

    def _check(self, num_prompts: int) -> None:
        key = self._key
        if key.max_concurrent and self.num_running + num_prompts > key.max_concurrent:
            raise self._refused(
                "max_concurrent",
                f"has {self.num_running} prompts in flight; at most {key.max_concurrent} are "
                "served at a time",
            )
        if key.tokens_per_minute is None:
            return
        tokens_per_s, now_at = key.tokens_per_minute / _MINUTE_S, self._clock()
        left = self._left + (now_at - self._counted_at) * tokens_per_s
        self._left, self._counted_at = min(left, float(key.tokens_per_minute)), now_at
        if self._left <= 0:
            # Running requests will give back their unused tokens, so these do not count.
            num_missing = -self._left - sum(unused() for unused in self._unused)
            raise self._refused(
                "tokens_per_minute",
                f"has used its {key.tokens_per_minute} tokens per minute",
                retry_after_s=math.ceil(num_missing / tokens_per_s),
            )

    def _refused(self, limit: str, text: str, retry_after_s: int = 1) -> OverloadedError:
        self._count("key_refusals", limit)
        message = f"the API key {self.name!r} {text} ({limit} of this key)"
        return OverloadedError(message, retry_after_s=max(1, retry_after_s), code=limit)

    def _count(self, name: str, *labels: str, by: float = 1) -> None:
        if self.name:
            self._metrics.count(name, self.name, *labels, by=by)


class Clients:
    """Holds the clients of a router. ``check`` verifies keys; None: the router has no keys."""

    def __init__(
        self, keys: Sequence[ClientKey], metrics: RouterMetrics, clock: Callable[[], float]
    ) -> None:
        self._by_hash = {key.sha256: Client(key, metrics, clock) for key in keys}
        # Clients without a key: the router has no keys, or they use the admin socket.
        self._anonymous = Client(ClientKey(name="", sha256=""), metrics, clock)
        self.check = self._check if keys else None

    def __iter__(self) -> Iterator[Client]:
        return iter(self._by_hash.values())

    def of(self, http: web.Request) -> Client:
        client = http.get(_CLIENT, self._anonymous)
        assert isinstance(client, Client)
        return client

    def _check(self, http: web.Request) -> None:
        # Looked up by hash, so the time reveals nothing about similar keys.
        client = self._by_hash.get(hashlib.sha256(bearer_token(http)).hexdigest())
        if client is None:
            message = "the API key is missing or wrong"
            raise RequestError(message, status=401, code="invalid_api_key")
        http[_CLIENT] = client
