"""Connects the server to one incarnation of its rank 0."""

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
from pdlaunch.protocol import engine
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.sockets import SecureContext

_log = logging.getLogger(__name__)

_STATS_CALL = -1  # key of the future of the next EngineStats

# None: the rank died or was replaced while it worked on the request
RankEvent = engine.Tokens | engine.RequestFinished | None
Sink = Callable[[RankEvent], None]
OfNoRequest = engine.Welcome | engine.EngineStats | engine.SleepReply | KVBlocks


class RankLink:
    """Sends requests to one incarnation of rank 0 and passes its events to their sinks. Each
    submitted request ends with one RequestFinished, or with None, unless it is aborted.
    """

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        *,
        identity: str,
        on_message: Callable[[OfNoRequest], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_message`` gets messages of no request, and replies to an earlier server."""
        self._socket: Any = context.connect(
            zmq.DEALER, endpoint, identity=identity.encode(), socket_class=zmq.asyncio.Socket
        )
        self._on_message = on_message
        self._clock = clock
        self._seen_at = clock()
        self._sinks: dict[RequestId, Sink] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        # A random start, so that replies to calls of an earlier server have other ids.
        self._call_ids = itertools.count(secrets.randbits(32))
        self.send(engine.Hello())
        self._reader = asyncio.create_task(self._read())

    @property
    def silence_s(self) -> float:
        return self._clock() - self._seen_at

    def submit(self, request: engine.AddRequest, sink: Sink) -> None:
        # Send it first: a request that cannot be encoded then leaves no sink behind.
        self.send(request)
        self._sinks[request.request_id] = sink

    def abort(self, request_id: RequestId) -> None:
        """Drop a request, or end the lease of a finished one; nothing more reaches its sink."""
        self._sinks.pop(request_id, None)
        self.send(engine.AbortRequest(request_id=request_id))

    def send(self, message: engine.ToRank) -> None:
        # After ``close``, it is dropped. The socket has no high-water mark, so this never waits.
        if not self._socket.closed:
            self._socket.send(engine.to_rank.encode(message))

    async def call(self, message: engine.Sleep | engine.WakeUp | engine.CheckIntegrity) -> Any:
        """Send the message; return its reply. Raises OverloadedError when the rank is lost."""
        message.call_id = next(self._call_ids)
        return await self._call(message.call_id, message)

    async def read_stats(self) -> None:
        """Wait until ``on_message`` has new totals, which include all that the rank has sent until
        then. Raises OverloadedError if the rank is lost.
        """
        await self._call(_STATS_CALL, engine.ReadStats())

    async def _call(self, call_id: int, message: engine.ToRank) -> Any:
        reply = self._calls.setdefault(call_id, asyncio.get_running_loop().create_future())
        self.send(message)
        # Shielded, because several callers may share the reply and one of them may be cancelled.
        return await asyncio.shield(reply)

    def _reply(self, call_id: int, message: object) -> None:
        if (reply := self._calls.pop(call_id, None)) is not None:
            reply.set_result(message)

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()
        for reply in self._calls.values():
            reply.set_exception(
                OverloadedError("rank 0 has ended", status=503, code="engine_starting")
            )
            reply.exception()  # marks it as retrieved, in case no caller waits
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(None)

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            self._seen_at = self._clock()
            try:
                message = engine.from_rank.decode(frame)
            except ProtocolError as error:
                _log.error("dropped a message of rank 0: %s", error)
                continue
            self._handle(message)

    def _handle(self, message: engine.FromRank) -> None:
        match message:
            case engine.Outputs(items=items):
                for item in items:
                    ends = isinstance(item, engine.RequestFinished)
                    take = self._sinks.pop if ends else self._sinks.get
                    if (sink := take(item.request_id, None)) is not None:
                        sink(item)
            case engine.Welcome() | KVBlocks():
                self._on_message(message)
            case engine.EngineStats():
                self._on_message(message)
                self._reply(_STATS_CALL, None)
            case engine.SleepReply():
                self._on_message(message)
                self._reply(message.call_id, message)
            case engine.IntegrityReport():
                self._reply(message.call_id, message)
