"""Carries calls of one engine over one connection of HTTP/1.1, and holds their answers.

::

    engine ──▶ EngineConnection ── head, pieces of the body, end ──▶ Answer ──▶ its reader
                   ◀── reads no more while too much waits ──     │

An answer that ends otherwise than HTTP says is an error, and its connection carries no other call.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import httptools

MAX_HEAD_BYTES = 64 * 1024
"""Limits the head of an answer, its trailer, and what else comes without any of its body."""
MAX_BODY_BYTES = 1024**3
"""Limits a body that is read as a whole, where nobody says otherwise."""
HIGH_WATER_BYTES = 512 * 1024
"""Bytes of an answer that wait for their reader before the engine has to wait."""
KEEPALIVE_S = 2.0
"""Shorter than any engine's own, so that no request is sent into a connection that is being
closed.
"""
END_S = 1.0
"""Time for which an engine that has said all is waited for, to use its connection again."""

Probe = Callable[[], Awaitable[None]]
"""Is awaited after each silence, and raises when the engine has died."""


class CallError(Exception):
    """Says why a call has no whole answer; it quotes nothing that was sent or that came.

    ``unheard``: the engine cannot have seen the request.
    """

    def __init__(self, reason: str, *, unheard: bool = False) -> None:
        super().__init__(reason)
        self.unheard = unheard


class Silence(NamedTuple):
    """Says how an answer is waited for."""

    stall_s: float
    probe: Probe


class Answer:
    """Holds one answer as it comes; read by one task at a time. ``close`` or ``leave`` it."""

    def __init__(self, connection: EngineConnection, silence: Silence | None) -> None:
        self.status = 0
        """0 until the head has come."""
        self.headers: dict[str, str] = {}
        """By name in lower case."""
        self.has_ended = False
        """All of it has come."""
        self._connection = connection
        self._silence = silence
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_wanted = True
        self._error: CallError | None = None
        self._waiter: asyncio.Future[bool] | None = None
        """Gets True for news, False when there was none for ``stall_s``."""
        self._waits_since_at = 0.0
        # One timer for all of an answer: one for each piece took a tenth of the time for a token.
        self._timer: asyncio.TimerHandle | None = None
        if silence is not None:
            self._timer = self._loop.call_later(silence.stall_s, self._look)

    async def head(self) -> None:
        """Return when the head has come. Raises CallError, and what the probe raises."""
        while not self.status:
            await self._news()

    async def read_some(self) -> bytes:
        """Return the next bytes, none at the end. Raises CallError, and what the probe raises."""
        while not self._pieces:
            if self.has_ended:
                return b""
            await self._news()
        pieces, self._pieces = self._pieces, []
        if self._num_bytes > HIGH_WATER_BYTES and not self.has_ended:
            self._connection.transport.resume_reading()
        self._num_bytes = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read(self, max_bytes: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body. Raises as ``read_some`` does, and CallError for a larger one."""
        pieces, num_bytes = [], 0
        while piece := await self.read_some():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise CallError(f"its answer has more than {max_bytes} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Give up what has not come, by closing the connection: that ends the engine's work."""
        self._stop_timer()
        if not self.has_ended:
            self._connection.transport.abort()

    def leave(self) -> None:
        """Want nothing more of an answer that is about to end, so that its connection can be used
        again when the end comes soon.
        """
        self._stop_timer()
        self._is_wanted = False
        self._pieces.clear()
        if not self.has_ended:
            self._timer = self._loop.call_later(END_S, self._connection.transport.abort)
            if self._num_bytes > HIGH_WATER_BYTES:
                self._connection.transport.resume_reading()

    def begins(self, status: int) -> None:
        """Take the status; the head is complete."""
        self.status = status
        self._tell(has_news=True)

    def comes(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        if not self._is_wanted:
            return
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        if self._num_bytes > HIGH_WATER_BYTES:
            self._connection.transport.pause_reading()
        self._tell(has_news=True)

    def ends(self, error: CallError | None = None) -> None:
        """Take the end; with an error nothing more will come."""
        self._stop_timer()
        self.has_ended, self._error = error is None, error
        self._tell(has_news=True)

    async def _news(self) -> None:
        """Wait for something to come; after a silence make sure that the engine lives."""
        if self._error is not None:
            raise self._error
        self._waiter = waiter = self._loop.create_future()
        self._waits_since_at = time.monotonic()
        try:
            has_news = await waiter
        finally:
            self._waiter = None
        if not has_news and self._silence is not None:
            await self._silence.probe()

    def _tell(self, *, has_news: bool) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(has_news)

    def _look(self) -> None:
        """Wake who has waited for too long; look again when another one may have."""
        assert self._silence is not None
        next_s = self._silence.stall_s
        if self._waiter is not None:
            left_s = self._waits_since_at + next_s - time.monotonic()
            if left_s > 0:
                next_s = left_s
            else:
                self._tell(has_news=False)
        self._timer = self._loop.call_later(next_s, self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class EngineConnection(asyncio.Protocol):
    """Carries one call at a time; rests in ``resting`` between two of them."""

    transport: asyncio.Transport

    def __init__(self, resting: dict[EngineConnection, None]) -> None:
        self._resting = resting
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[str, str] = {}
        self._num_bodiless_bytes = 0
        """Counts the bytes since a body's last piece; some of that piece may be among them."""
        self._is_bodiless = False
        self._rest_timer: asyncio.TimerHandle | None = None
        self._arrivals = select.poll()

    def call(
        self, head: bytes, body: bytes, silence: Silence | None, *, is_bodiless: bool = False
    ) -> Answer:
        """Send a request; return its answer, of which nothing has come yet.

        ``is_bodiless``: the answer ends with its head, whatever that says.
        """
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        answer = Answer(self, silence)
        if self.transport.is_closing():
            # It was closed as soon as it was there, before anybody waited for it.
            answer.ends(CallError("it closed the connection at once", unheard=True))
            return answer
        self._answer, self._is_bodiless = answer, is_bodiless
        # Together, so that both leave in one piece; a long body is not copied for that.
        if len(body) < MAX_HEAD_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._arrivals.register(transport.get_extra_info("socket"), select.POLLIN)

    def is_quiet(self) -> bool:
        """Tell whether neither bytes nor an end have come that the event loop is yet to see."""
        return not self.transport.is_closing() and not self._arrivals.poll(0)

    def eof_received(self) -> None:
        # At once: a request that the engine has left unread would keep the connection open.
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.transport.abort()  # nobody has asked
            return
        self._num_bodiless_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break("its answer is no valid HTTP")
            return
        if self._num_bodiless_bytes > MAX_HEAD_BYTES:
            what = "trailer" if answer.status else "head"
            self._break(f"the {what} of its answer is too long")

    def connection_lost(self, error: Exception | None) -> None:
        self._resting.pop(self, None)
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if answer.status and error is None and _ends_with_connection(answer.headers):
            answer.ends()
        else:
            when = "in the middle of its answer" if answer.status else "without an answer"
            answer.ends(CallError(f"it closed the connection {when}"))

    def on_message_begin(self) -> None:
        if self._answer is None:
            self.transport.abort()  # or the next call would get what nobody has asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is None or self._answer.status:
            return  # a trailer, which is not that of the next answer
        decoded = value.decode("utf-8", "surrogateescape")
        self._headers[name.decode("latin-1").lower()] = decoded

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, {}
        status, answer = self._parser.get_status_code(), self._answer
        if status < 100:
            raise ValueError(status)
        if answer is not None and status >= 200:  # others come before the answer
            answer.headers = headers
            answer.begins(status)
            if self._is_bodiless:
                # The parser would wait for the body that the head speaks of.
                self._answer = None
                answer.ends()
                self.transport.abort()

    def on_body(self, piece: bytes) -> None:
        self._num_bodiless_bytes = 0
        if self._answer is not None:
            self._answer.comes(piece)

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or not answer.status:
            return
        self._answer, self._num_bodiless_bytes = None, 0
        answer.ends()
        # An answer that came before all of the request was sent leaves the rest of it in the way.
        if self._parser.should_keep_alive() and not self.transport.get_write_buffer_size():
            self.transport.resume_reading()  # its last piece may have been too much for its reader
            self._resting[self] = None
            self._rest_timer = asyncio.get_running_loop().call_later(
                KEEPALIVE_S, self.transport.abort
            )
        else:
            self.transport.abort()

    def _break(self, reason: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.ends(CallError(reason))
        self.transport.abort()


def _ends_with_connection(headers: Mapping[str, str]) -> bool:
    """Tell whether nothing but the end of the connection ends the answer."""
    return "content-length" not in headers and "transfer-encoding" not in headers
