"""Simulates a deployment on the costs that its engines tell, with the router's own policy.

::

    arrivals ──▶ policy ──▶ engines, step by step ──▶ times of tokens
                   ▲              │ reports, first tokens, ends
                   └── takeovers ◀┘

Events are the arrivals of requests, the ends of steps and the ends of pulls; the clock jumps from
one to the next. What the policy sees of an engine is a ``router.engine.Engine``, which is told and
counted as the router does it. An engine computes as the scheduler does: the next tokens of its
streams, and beside them a chunk of the prompts in their order. Prefix caches are not simulated.

``python -m pdlaunch.testing.simulated_run`` compares it with a real run (``--help``).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.costs import EngineCosts, EngineReport, StepWork, StreamPauses
from pdlaunch.router.engine import Engine
from pdlaunch.router.policy import NoIndex, Policy, Route, RoutingRequest

_INDEX = NoIndex()


@dataclass(slots=True, eq=False)
class SimRequest:
    """Holds one request and the instants at which its client got tokens."""

    number: int
    arrived_at: float
    num_prompt_tokens: int
    num_output_tokens: int
    tokens_at: list[float] = field(default_factory=list)
    route: Route | None = None
    computed_at: list[str] = field(default_factory=list)
    """The engines that have computed its prompt."""
    num_computed: int = 0
    was_taken_over: bool = False

    @property
    def ttft_s(self) -> float:
        return self.tokens_at[0] - self.arrived_at

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in itertools.pairwise(self.tokens_at)]

    @property
    def context_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.tokens_at)

    @property
    def most_tokens(self) -> int:
        """Return the tokens that it has in a KV cache when it ends."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def is_done(self) -> bool:
        return len(self.tokens_at) == self.num_output_tokens


class SimEngine:
    """Computes prompts and streams in steps; a request holds its seat and all its room at once."""

    def __init__(self, name: str, role: Role, costs: EngineCosts, speed: float = 1.0) -> None:
        """``speed``: how fast it really is beside what its costs say."""
        self.costs = costs
        self.speed = speed
        self.waiting: deque[SimRequest] = deque()
        """Prompts and streams that have no seat yet, in the order in which they came."""
        self.prompts: list[SimRequest] = []
        self.streams: list[SimRequest] = []
        self.leased_tokens = 0
        """Tokens of prompts that are computed and not pulled yet."""
        self.is_stepping = False
        self.computing: list[SimRequest] = []
        """Prompts of the step that runs."""
        self.stream_seconds = 0.0
        self.pauses = StreamPauses(costs.most_long_gaps)
        able = Capabilities(resumes=True, gives_first_token=True, awaits_lease=True, costs=costs)
        self.view = Engine(
            name=name,
            processes=(1,),
            url="",
            role=role,
            capabilities=able,
            ready=True,
            state="ready",
        )

    @property
    def held_tokens(self) -> int:
        seated = [*self.prompts, *self.streams]
        return self.leased_tokens + sum(request.most_tokens for request in seated)

    def has_room_for(self, request: SimRequest) -> bool:
        has_seat = len(self.prompts) + len(self.streams) < self.costs.max_num_seqs
        return has_seat and self.held_tokens + request.most_tokens <= self.costs.num_kv_tokens

    def seat(self) -> None:
        """Give seats in the order of arrival, to as many as there is room for."""
        while self.waiting and self.has_room_for(self.waiting[0]):
            request = self.waiting.popleft()
            (self.streams if request.tokens_at else self.prompts).append(request)

    def plan(self) -> tuple[StepWork, list[SimRequest], list[tuple[SimRequest, int]]]:
        """Return a step: its work, its streams, and how much of which prompts."""
        streams = list(self.streams)
        context_tokens = sum(request.context_tokens for request in streams)
        todo = sum(request.num_prompt_tokens - request.num_computed for request in self.prompts)
        most: Callable[..., int] = partial(self.costs.chunk_tokens, len(streams), context_tokens)
        prompts: Iterable[SimRequest] = self.prompts
        if self.pauses.leave_out(len(streams), todo, most()):
            streams, context_tokens, most = [], 0, self.costs.pause_chunk
        elif streams and self.pauses.has_begun:
            prompts = ()
        chunks: list[tuple[SimRequest, int]] = []
        attended, share_left = 0.0, 1.0
        for request in prompts:
            most_tokens = most(request.num_computed)
            # Rounded up a little: shares of a step add up to somewhat more or less.
            room = int(most_tokens * share_left + 1e-6)
            num_tokens = min(room, request.num_prompt_tokens - request.num_computed)
            if num_tokens <= 0:
                break
            chunks.append((request, num_tokens))
            attended += num_tokens * (request.num_computed + num_tokens / 2)
            share_left -= num_tokens / most_tokens
        work = StepWork(
            num_streams=len(streams),
            context_tokens=context_tokens,
            prompt_tokens=sum(number for _, number in chunks),
            attended_tokens=attended,
        )
        return work, streams, chunks

    def report(self) -> EngineReport:
        prompts = [*self.prompts, *(one for one in self.waiting if not one.tokens_at)]
        return EngineReport(
            sum(request.num_prompt_tokens - request.num_computed for request in prompts),
            len(self.streams),
            sum(request.context_tokens for request in self.streams),
            self.costs.num_kv_tokens - self.held_tokens,
            self.costs,
            self.pauses.num_left,
            self.stream_seconds,
        )


class Simulation:
    """Runs requests through engines. ``pull_s``: the time in which a prompt's blocks are pulled.

    ``requests`` come at their instants; with ``concurrency`` the next one comes when one has ended.
    ``way_s``: the time that a request takes to the router, and ``slowness`` that of a step as a
    multiple of what it should take; both are drawn anew each time.
    """

    def __init__(
        self,
        engines: Sequence[SimEngine],
        policy: Policy,
        *,
        pull_s: Callable[[SimRequest], float] = lambda _: 0.0,
        way_s: Callable[[], float] = lambda: 0.0,
        slowness: Callable[[], float] = lambda: 1.0,
        check: Callable[[Simulation], None] = lambda _: None,
    ) -> None:
        self.engines = {engine.view.name: engine for engine in engines}
        self.now_at = 0.0
        self.done: list[SimRequest] = []
        self._policy = policy
        self._pull_s = pull_s
        self._way_s = way_s
        self._slowness = slowness
        self._check = check
        self._views = [engine.view for engine in engines]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._clients: deque[SimRequest] = deque()

    def run(self, requests: Sequence[SimRequest], concurrency: int | None = None) -> None:
        """Return when every request has its last token."""
        first = len(requests) if concurrency is None else concurrency
        self._clients.extend(requests[first:])
        for request in requests[:first]:
            self._at(request.arrived_at + self._way_s(), partial(self._arrives, request))
        while self._events:
            self.now_at, _, act = heapq.heappop(self._events)
            act()
            self._check(self)

    def _at(self, instant: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (instant, next(self._order), act))

    def _routing_request(self, request: SimRequest) -> RoutingRequest:
        return RoutingRequest(
            hop="prefill",
            num_prompt_tokens=request.num_prompt_tokens,
            max_tokens=max(2, request.num_output_tokens),
        )

    def _arrives(self, request: SimRequest) -> None:
        request.arrived_at = self.now_at
        route = self._policy.choose(
            self._routing_request(request), self._views, (), _INDEX, self.now_at
        )
        if route.prefill is None and route.decode is None:
            alone = msgspec.structs.replace(self._routing_request(request), hop="decode")
            route = self._policy.choose(alone, self._views, (), _INDEX, self.now_at)
        self._send(request, route)

    def _send(self, request: SimRequest, route: Route) -> None:
        request.route = route
        first = route.prefill or route.decode
        assert first is not None
        first.num_picks += 1
        self._count(first, request, 1)
        decode = first if route.prefill is None else route.planned or route.decode
        if decode is not None:
            self._count_stream(decode, request, 1)
            self._expect(decode, request, 1)
        self._begin(self.engines[first.name], request)

    def _begin(self, engine: SimEngine, request: SimRequest) -> None:
        engine.waiting.append(request)
        self._step(engine)

    def _step(self, engine: SimEngine) -> None:
        """Begin a step unless one runs or there is nothing to do."""
        if engine.is_stepping:
            return
        engine.seat()
        work, streams, chunks = engine.plan()
        if not streams and not chunks:
            return
        engine.is_stepping = True
        engine.computing = [request for request, _ in chunks]
        if streams:
            engine.pauses.ran_streams(len(streams))
        elif engine.streams:
            engine.pauses.ran_prompts(engine.costs.steps.seconds(work))
        step_s = engine.costs.steps.seconds(work) / engine.speed * self._slowness()
        end_at = self.now_at + step_s
        engine.stream_seconds += len(streams) * (end_at - self.now_at)
        self._at(end_at, lambda: self._ends(engine, streams, chunks))

    def _ends(
        self,
        engine: SimEngine,
        streams: Sequence[SimRequest],
        chunks: Sequence[tuple[SimRequest, int]],
    ) -> None:
        for request, num_tokens in chunks:
            request.num_computed += num_tokens
            if request.num_computed == request.num_prompt_tokens:
                engine.prompts.remove(request)
                self._prompt_is_computed(engine, request)
        for request in streams:
            request.tokens_at.append(self.now_at)
            if request.is_done:
                engine.streams.remove(request)
                self._is_done(engine, request)
        engine.view.hear(engine.report(), self.now_at)
        # Not before: what ends above may send a prompt here, which must not begin a step by itself.
        engine.is_stepping = False
        self._step(engine)

    def _prompt_is_computed(self, engine: SimEngine, request: SimRequest) -> None:
        request.computed_at.append(engine.view.name)
        request.tokens_at.append(self.now_at)
        self._count(engine.view, request, -1)
        route = request.route
        assert route is not None
        expecting = engine.view if route.prefill is None else route.planned or route.decode
        if expecting is not None:
            self._expect(expecting, request, -1)
        if route.prefill is None:
            if request.is_done:
                self._is_done(engine, request)
            else:
                engine.streams.append(request)
        elif request.is_done:
            if expecting is not None:
                self._count_stream(expecting, request, -1)
            self._is_done(None, request)
        else:
            decode = expecting or self._any_decode()
            if expecting is None:
                self._count_stream(decode, request, 1)
            engine.leased_tokens += request.num_prompt_tokens
            end_at = self.now_at + self._pull_s(request)
            self._at(end_at, lambda: self._is_pulled(engine, self.engines[decode.name], request))
        self._consider()

    def _any_decode(self) -> Engine:
        decodes = [view for view in self._views if view.role == "decode"]
        return min(decodes, key=lambda view: view.num_streams)

    def _is_pulled(self, source: SimEngine, target: SimEngine, request: SimRequest) -> None:
        source.leased_tokens -= request.num_prompt_tokens
        self._begin(target, request)
        self._step(source)

    def _is_done(self, engine: SimEngine | None, request: SimRequest) -> None:
        if engine is not None:
            self._count_stream(engine.view, request, -1)
        self.done.append(request)
        if self._clients:
            following = self._clients.popleft()
            self._at(self.now_at + self._way_s(), lambda: self._arrives(following))
        self._consider()

    def _consider(self) -> None:
        """Let the last prompt of each queue at a prefill engine be taken over, as the router."""
        for engine in self.engines.values():
            if engine.view.role != "prefill":
                continue
            # Those whose first chunk is in the step that runs have begun.
            queue = [
                request
                for request in (*engine.prompts, *engine.waiting)
                if not request.num_computed and request not in engine.computing
            ]
            if not queue:
                continue
            request = queue[-1]
            if request.route is None or request.route.prefill is None:
                continue
            route = self._policy.take_over(
                self._routing_request(request),
                engine.view,
                self._views,
                (),
                _INDEX,
                self.now_at,
            )
            if route is not None:
                (engine.waiting if request in engine.waiting else engine.prompts).remove(request)
                self._count(engine.view, request, -1)
                left = request.route.planned or request.route.decode
                if left is not None:
                    self._count_stream(left, request, -1)
                    self._expect(left, request, -1)
                request.was_taken_over = True
                self._send(request, route)

    def _count(self, view: Engine, request: SimRequest, sign: int) -> None:
        """Count a prompt as unanswered, or answered."""
        if sign < 0:
            view.computed(request.num_prompt_tokens, self.now_at)
        elif not view.unanswered_tokens:
            view.progressed_at = self.now_at
        view.unanswered_tokens += sign * request.num_prompt_tokens
        view.num_prompt_tokens += sign * request.num_prompt_tokens

    def _count_stream(self, view: Engine, request: SimRequest, sign: int) -> None:
        view.num_streams += sign
        view.context_tokens += sign * request.num_prompt_tokens

    def _expect(self, view: Engine, request: SimRequest, sign: int) -> None:
        """Count a stream as one whose prompt is not computed yet."""
        view.num_expected += sign
        view.expected_tokens += sign * request.num_prompt_tokens
