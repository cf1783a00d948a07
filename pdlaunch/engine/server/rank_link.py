"""Connects the server to one incarnation of its rank 0."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from pdlaunch.errors import OverloadedError, ProtocolError, RequestError
from pdlaunch.protocol.costs import EngineReport
from pdlaunch.protocol.engine import (
    AbortRequest,
    AddRequest,
    CheckIntegrity,
    EngineStats,
    FromRank,
    Hello,
    IntegrityReport,
    Outputs,
    ReadStats,
    RequestFinished,
    Sleep,
    SleepReply,
    Tokens,
    ToRank,
    WakeUp,
    Welcome,
    WithdrawRequest,
    from_rank,
    to_rank,
)
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.sockets import SecureContext

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankLost:
    """Tells that the rank died or was replaced while it worked on the request."""

    request_id: RequestId


RankEvent = Tokens | RequestFinished | RankLost
Sink = Callable[[RankEvent], None]


class RankLink:
    """Sends requests to rank 0 and brings its events back; every submitted request ends with one
    RequestFinished or RankLost unless it is aborted.

    Belongs to the event loop that made it. Another incarnation of the rank gets another link.
    """

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        *,
        identity: str,
        on_welcome: Callable[[Welcome], None],
        on_stats: Callable[[EngineStats], None],
        on_sleep: Callable[[SleepReply], None] = lambda _: None,
        on_report: Callable[[EngineReport | None], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket: Any = context.connect(
            zmq.DEALER, endpoint, identity=identity.encode(), socket_class=zmq.asyncio.Socket
        )
        self._on_welcome = on_welcome
        self._on_stats = on_stats
        self._on_sleep = on_sleep
        self._on_report = on_report
        self._clock = clock
        self._heard_at = clock()
        self._sinks: dict[RequestId, Sink] = {}
        self._checks: dict[int, asyncio.Future[IntegrityReport]] = {}
        self._sleeps: dict[int, asyncio.Future[SleepReply]] = {}
        self._stats_readers: list[asyncio.Future[None]] = []
        self._call_ids = itertools.count(1)
        self.send(Hello())
        self._reader = asyncio.create_task(self._read())

    @property
    def silence_s(self) -> float:
        """Return the seconds since the rank said anything, or since this link was made."""
        return self._clock() - self._heard_at

    def submit(self, request: AddRequest, sink: Sink) -> None:
        """Start a request; ``sink`` is called from the event loop with whatever comes back. Raises
        RequestError.
        """
        if request.request_id in self._sinks:
            raise RequestError(f"a request {request.request_id} is under way")
        # First sent, then remembered: a request that cannot be encoded leaves nothing behind.
        self.send(request)
        self._sinks[request.request_id] = sink

    def abort(self, request_id: RequestId, last: Sink | None = None) -> bool:
        """Drop a request, or end the lease of a finished one; nothing more reaches its sink.

        What still comes of it goes to ``last``; False when nothing will.
        """
        runs = self._sinks.pop(request_id, None) is not None
        if runs and last is not None:
            self._sinks[request_id] = last
        self.send(AbortRequest(request_id=request_id))
        return runs

    def withdraw(self, request_ids: list[RequestId]) -> None:
        """End requests that have not begun; their sinks are told if they end."""
        self.send(WithdrawRequest(request_ids=request_ids))

    def send(self, message: ToRank) -> None:
        """Queue any message; after the end of the connection nobody hears it.

        Encodes it here, so that one that cannot be encoded is its sender's error alone. A socket
        without a high-water mark takes all at once: there is nothing to wait for.
        """
        if not self._socket.closed:
            self._socket.send(to_rank.encode(message))

    async def check_integrity(self) -> IntegrityReport:
        """Have the rank prove who owns each KV block. Raises OverloadedError when it is gone
        meanwhile.
        """
        call_id = next(self._call_ids)
        answer: asyncio.Future[IntegrityReport] = asyncio.get_running_loop().create_future()
        self._checks[call_id] = answer
        self.send(CheckIntegrity(call_id=call_id))
        try:
            return await answer
        finally:
            del self._checks[call_id]

    async def read_stats(self) -> None:
        """Have the rank send its totals, and wait until ``on_stats`` has them.

        What the rank has said before is counted in them: messages keep their order. Raises
        OverloadedError when the rank is gone meanwhile.
        """
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stats_readers.append(arrived)
        self.send(ReadStats())
        await arrived

    async def sleep(self, level: int, timeout_s: float) -> SleepReply:
        """Have the engine fall asleep, at the latest ``timeout_s`` from now. Raises OverloadedError
        when the rank is lost.
        """
        return await self._call_sleep(
            lambda call_id: Sleep(call_id=call_id, level=level, timeout_s=timeout_s)
        )

    async def wake_up(self, tags: list[str]) -> SleepReply:
        """Have the engine wake these pools up, or all. Raises OverloadedError when the rank is
        lost.
        """
        return await self._call_sleep(lambda call_id: WakeUp(call_id=call_id, tags=tags))

    async def _call_sleep(self, build: Callable[[int], ToRank]) -> SleepReply:
        call_id = next(self._call_ids)
        answer: asyncio.Future[SleepReply] = asyncio.get_running_loop().create_future()
        self._sleeps[call_id] = answer
        self.send(build(call_id))
        try:
            return await answer
        finally:
            del self._sleeps[call_id]

    async def close(self) -> None:
        """End the connection; requests under way get RankLost."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()
        calls: list[asyncio.Future[Any]] = [
            *self._checks.values(),
            *self._sleeps.values(),
            *self._stats_readers,
        ]
        for call in calls:
            if not call.done():
                call.set_exception(_lost())
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(RankLost(request_id))

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            self._heard_at = self._clock()
            try:
                message = from_rank.decode(frame)
            except ProtocolError as error:
                _log.error("dropped from rank 0: %s", error)
                continue
            self._handle(message)

    def _handle(self, message: FromRank) -> None:
        match message:
            case Outputs(items=items, report=report):
                self._on_report(report)
                for item in items:
                    self._deliver(item)
            case Welcome():
                self._on_welcome(message)
            case EngineStats():
                self._on_stats(message)
                readers, self._stats_readers = self._stats_readers, []
                for reader in readers:
                    if not reader.done():
                        reader.set_result(None)
            case SleepReply():
                if (sleep := self._sleeps.get(message.call_id)) is not None and not sleep.done():
                    sleep.set_result(message)
                else:
                    self._on_sleep(message)
            case IntegrityReport():
                if (check := self._checks.get(message.call_id)) is not None and not check.done():
                    check.set_result(message)

    def _deliver(self, item: Tokens | RequestFinished) -> None:
        """Hand an item to its request; items of aborted requests are dropped."""
        finished = isinstance(item, RequestFinished)
        sink = (
            self._sinks.pop(item.request_id, None) if finished else self._sinks.get(item.request_id)
        )
        if sink is not None:
            sink(item)


def _lost() -> OverloadedError:
    return OverloadedError("the rank has gone", status=503, code="engine_starting")
