"""Holds what the HTTP handlers of one engine share: model, link to rank 0, limits, leases."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict

from prometheus_client import CollectorRegistry

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.server.metrics import ServerMetrics
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.sleep import SleepDesk
from pdlaunch.errors import OverloadedError
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S
from pdlaunch.http.headers import IgnoredFields
from pdlaunch.http.limits import (
    Admission,
    BodyBudget,
    Deadlines,
    Grow,
    LargeInputs,
    max_engine_body_bytes,
)
from pdlaunch.observe.spans import SpanLog, SpanReport
from pdlaunch.protocol.engine import EngineStats, SleepReply, Welcome
from pdlaunch.protocol.ids import HopId, RequestId

MAX_REMEMBERED_LEASES = 4096
MAX_KEPT_SPANS = 256
WAIT_FOR_SPANS_S = 2.0
"""Rank 0 tells its part at the end of a step. A router may ask before its own leaving is seen."""
READ_STATS_TIMEOUT_S = 1.5
"""Rank 0 answers between two steps. Routers wait a little longer for a page of metrics."""
RANK_SILENCE_S = 30.0
"""Rank 0 speaks every second between its steps; after this silence it counts as hung."""


class EngineService:
    """Holds what the HTTP handlers of one engine share; belongs to the event loop."""

    def __init__(self, spec: EngineSpec, registry: CollectorRegistry) -> None:
        self.spec = spec
        limits = spec.limits
        self.admission = Admission(limits.max_queued_requests, _shutting_down)
        self.deadlines = Deadlines(limits.request_timeout_s, _shutting_down)
        self.max_body_bytes = max_engine_body_bytes(limits.max_body_bytes, spec.max_model_len)
        # Room for what a router lets in, and for one of the longest that it makes of it.
        budget_bytes = limits.body_budget_bytes + 2 * self.max_body_bytes
        self.bodies = BodyBudget(budget_bytes, self.max_body_bytes)
        self.inputs = LargeInputs()
        self.ignored_fields = IgnoredFields()
        self.metrics = ServerMetrics(
            registry,
            engine=spec.name,
            role=spec.role,
            model_name=spec.served_model_name,
            cache_config={
                "block_size": str(spec.block_size),
                "cache_dtype": spec.dtype,
                "enable_prefix_caching": str(spec.enable_prefix_caching),
                "gpu_memory_utilization": str(spec.gpu_memory_utilization),
            },
        )
        self.leases: OrderedDict[str, RequestId] = OrderedDict()
        """The requests whose leases were handed out, by the hop's id and by the lease's."""
        self._unsent_spans: OrderedDict[HopId, tuple[SpanLog, asyncio.Event]] = OrderedDict()
        """Of requests whose answer nobody took, whole once the event is set."""
        self._spans_kept = asyncio.Event()
        self.sleep = SleepDesk(spec, self.admission, self.live_link)
        self.loaded: ServedModel | None = None
        self.welcomed = asyncio.Event()
        self._link: RankLink | None = None

    @property
    def model(self) -> ServedModel:
        """Return the model. Raises OverloadedError (503) while the server loads."""
        if self.loaded is None:
            raise _starting()
        return self.loaded

    @property
    def link(self) -> RankLink:
        """Return the link to a rank that has said Welcome. Raises OverloadedError (503)."""
        if self._link is None or not self.welcomed.is_set():
            raise _starting()
        return self._link

    def live_link(self) -> RankLink:
        """Return the link to a rank that can be given work. Raises OverloadedError (503)."""
        link = self.link
        if link.silence_s >= RANK_SILENCE_S:
            raise OverloadedError(
                f"rank 0 has been silent for {link.silence_s:.0f} s",
                status=503,
                code="engine_stalled",
            )
        return link

    def check_health(self) -> None:
        """Raise OverloadedError (503) that says why the engine takes no work now."""
        self.admission.check_open()
        self.sleep.check_awake()
        if self.loaded is None:
            raise _starting()
        self.live_link()

    def admit(self) -> contextlib.AbstractContextManager[Grow]:
        self.admission.check_open()
        self.sleep.check_awake()
        return self.admission.admit()

    async def use_link(self, link: RankLink | None) -> None:
        """Replace the link; requests of the old one are lost."""
        old, self._link = self._link, link
        # Before the old link's requests hear of it, as they may ask again at once.
        self.welcomed.clear()
        if old is not None:
            await old.close()

    async def read_stats(self) -> None:
        """Bring the rank's totals up to date; they stay as they were when it does not answer."""
        with contextlib.suppress(OverloadedError, TimeoutError):
            async with asyncio.timeout(READ_STATS_TIMEOUT_S):
                await self.live_link().read_stats()

    def hear(self, message: Welcome | EngineStats | SleepReply) -> None:
        """Take a message of rank 0 that is of no request."""
        match message:
            case Welcome(num_blocks=number):
                self.metrics.stats = EngineStats(num_blocks=number, num_free_blocks=number)
                self.sleep.settle(message.sleeping_tags)
                self.welcomed.set()
            case EngineStats():
                self.metrics.stats = message
            case SleepReply():
                self.sleep.settle(message.sleeping_tags)

    def remember_lease(self, hop_id: HopId, request_id: RequestId) -> None:
        """Find a lease by these ids; the oldest are forgotten, they have ended by themselves."""
        for key in (hop_id, request_id):
            self.leases[key] = request_id
            self.leases.move_to_end(key)
        while len(self.leases) > MAX_REMEMBERED_LEASES:
            self.leases.popitem(last=False)

    def keep_spans(self, hop_id: HopId, spans: SpanLog, ended: asyncio.Event) -> None:
        """Keep the spans of a request that was aborted, for a router that asks afterwards."""
        self._unsent_spans[hop_id] = spans, ended
        while len(self._unsent_spans) > MAX_KEPT_SPANS:
            self._unsent_spans.popitem(last=False)
        # Wakes all who wait; who comes later waits for the next one.
        self._spans_kept.set()
        self._spans_kept = asyncio.Event()

    async def take_spans(self, hop_id: HopId) -> SpanReport | None:
        """Return a request's spans, once; None when there are none of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_FOR_SPANS_S):
                while hop_id not in self._unsent_spans:
                    await self._spans_kept.wait()
                await self._unsent_spans[hop_id][1].wait()
        kept = self._unsent_spans.pop(hop_id, None)
        return None if kept is None else kept[0].report()


def _shutting_down() -> OverloadedError:
    return OverloadedError(
        "the engine is shutting down",
        status=503,
        retry_after_s=LEAVING_RETRY_AFTER_S,
        code="shutting_down",
    )


def _starting() -> OverloadedError:
    return OverloadedError("the engine is starting", status=503, code="engine_starting")
