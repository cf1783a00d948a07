"""Connects the server to one incarnation of its rank 0."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from pdlaunch.errors import OverloadedError, ProtocolError
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
    from_rank,
    to_rank,
)
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.sockets import SecureContext

_log = logging.getLogger(__name__)

_STATS_CALL = -1  # key of the future of the next EngineStats

# None: the rank died or was replaced while it worked on the request
RankEvent = Tokens | RequestFinished | None
Sink = Callable[[RankEvent], None]


class RankLink:
    """Sends requests to rank 0 and brings its events back; every submitted request ends with one
    RequestFinished, or None, unless it is aborted.

    Belongs to the event loop that made it. Another incarnation of the rank gets another link.
    """

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        *,
        identity: str,
        hear: Callable[[Welcome | EngineStats | SleepReply | KVBlocks], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``hear`` gets messages that belong to no request, and replies to an earlier server."""
        self._socket: Any = context.connect(
            zmq.DEALER, endpoint, identity=identity.encode(), socket_class=zmq.asyncio.Socket
        )
        self._hear = hear
        self._clock = clock
        self._heard_at = clock()
        self._sinks: dict[RequestId, Sink] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        # Replies to calls of an earlier server have other numbers.
        self._call_ids = itertools.count(secrets.randbits(32))
        self.send(Hello())
        self._reader = asyncio.create_task(self._read())

    @property
    def silence_s(self) -> float:
        return self._clock() - self._heard_at

    def submit(self, request: AddRequest, sink: Sink) -> None:
        """Start a request; the event loop calls ``sink`` with whatever comes back."""
        # First sent, then remembered: a request that cannot be encoded leaves nothing behind.
        self.send(request)
        self._sinks[request.request_id] = sink

    def abort(self, request_id: RequestId) -> None:
        """Drop a request, or end the lease of a finished one; nothing more reaches its sink."""
        self._sinks.pop(request_id, None)
        self.send(AbortRequest(request_id=request_id))

    def send(self, message: ToRank) -> None:
        """Queue any message; after the end of the connection nobody hears it.

        The socket has no high-water mark and takes all at once: there is nothing to wait for.
        """
        if not self._socket.closed:
            self._socket.send(to_rank.encode(message))

    async def call(self, message: Sleep | WakeUp | CheckIntegrity) -> Any:
        """Send the message; return its reply. Raises OverloadedError when the rank is lost."""
        message.call_id = next(self._call_ids)
        return await self._call(message.call_id, message)

    async def read_stats(self) -> None:
        """Have the rank send its totals, and wait until ``hear`` has them.

        What the rank has said before is counted in them. Raises OverloadedError when it is lost.
        """
        await self._call(_STATS_CALL, ReadStats())

    async def _call(self, call_id: int, message: ToRank) -> Any:
        reply = self._calls.setdefault(call_id, asyncio.get_running_loop().create_future())
        self.send(message)
        # Shielded: one of several callers may go away.
        return await asyncio.shield(reply)

    def _reply(self, call_id: int, message: object) -> None:
        if (reply := self._calls.pop(call_id, None)) is not None:
            reply.set_result(message)

    async def close(self) -> None:
        """End the connection; requests under way are lost."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()
        for reply in self._calls.values():
            reply.set_exception(
                OverloadedError("the rank has gone", status=503, code="engine_starting")
            )
            reply.exception()  # marks it as retrieved, in case no caller waits
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(None)

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
            case Outputs(items=items):
                for item in items:
                    ends = isinstance(item, RequestFinished)
                    take = self._sinks.pop if ends else self._sinks.get
                    if (sink := take(item.request_id, None)) is not None:
                        sink(item)
            case Welcome() | KVBlocks():
                self._hear(message)
            case EngineStats():
                self._hear(message)
                self._reply(_STATS_CALL, None)
            case SleepReply():
                self._hear(message)
                self._reply(message.call_id, message)
            case IntegrityReport():
                self._reply(message.call_id, message)
