"""Honours ``Idempotency-Key``: a request that is sent again is not run again, and its client is
told the same answer.

::

    first request ──▶ run ── events ──▶ Recording ──▶ its client
    the same again ───────────────────────┴─────────▶ whoever asks again, until KEEP_S after its end

A key belongs to the API key that it came with and to one request. The run goes on when its client
goes away. Only answers that succeeded are kept; what failed runs again. All of it is this process's
memory: a router that is killed has forgotten it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError, PdlaunchError, RequestError
from pdlaunch.http.sse import ClientStream, EventStream
from pdlaunch.protocol.ids import IdempotencyKey

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"
"""Marks an answer that was not made for this request."""
MAX_KEY_LENGTH = 255
KEEP_S = 600.0
"""Answers are kept this long after their end."""
MAX_KEPT = 1024
MAX_ANSWER_BYTES = 4 * 1024**2
MAX_BYTES = 32 * 1024**2
"""Bounds all answers together, those that are still being made too."""
MAX_READERS = 8
"""Bounds the readers of one answer: what each has not read yet is kept for it alone."""
WINDOW_BYTES = 64 * 1024
"""Bytes that a reader is sent at a time, and by which the readers of an answer that is too long to
be kept may be behind.
"""
_EVENT_OVERHEAD_BYTES = 64
"""Python takes about this much for each event besides its bytes."""

E = TypeVar("E", bound=BaseException)

Work = Callable[[EventStream], Awaitable[web.Response | None]]
"""Makes one answer: whole, or None when the stream was told all of it."""


def read_idempotency_key(headers: Mapping[str, str]) -> IdempotencyKey | None:
    """Return the key of a request, None without one. Raises RequestError."""
    key = headers.get(IDEMPOTENCY_KEY_HEADER)
    if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
        message = f"{IDEMPOTENCY_KEY_HEADER} has {len(key)} characters; use 1 to {MAX_KEY_LENGTH}"
        raise RequestError(message, param=IDEMPOTENCY_KEY_HEADER, code="invalid_idempotency_key")
    return None if key is None else IdempotencyKey(key)


class _Reader:
    """Marks how far one client has been told a recording."""

    position = 0
    """Events that it was sent."""


class Recording:
    """Keeps one answer, as far as it is known, and repeats it to any number of clients.

    It is the ``EventStream`` of the run that makes the answer. ``account`` adds to, or takes from,
    the bytes of all recordings, and says whether this one can be kept.
    """

    def __init__(
        self, name: bytes, content: bytes, account: Callable[[Recording, int], bool]
    ) -> None:
        self.name = name
        self.content = content
        self.num_bytes = 0
        self.kept = True
        """False once it is too long; then events go as soon as all readers have them."""
        self.ended_at: float | None = None
        self._account = account
        self._events: list[bytes] = []
        self._num_forgotten = 0
        self._has_ended = False
        self._stream_error: BaseException | None = None
        self._headers: dict[str, str] = {}
        self._response: web.Response | None = None
        self._error: Exception | None = None
        self._readers: set[_Reader] = set()
        self._changed = asyncio.Event()

    @property
    def has_succeeded(self) -> bool:
        return self._has_ended and self._stream_error is None and self._error is None

    @property
    def has_begun(self) -> bool:
        return bool(self._events) or self._num_forgotten > 0

    def add_headers(self, headers: Mapping[str, str]) -> None:
        self._headers |= headers

    async def write(self, event: bytes) -> None:
        """Record an event.

        Raises ConnectionError when the answer is too long to be kept and nobody reads it.
        """
        self._events.append(event)
        self._grow(len(event) + _EVENT_OVERHEAD_BYTES)
        self._tell()
        # An answer that is not kept goes at the pace of its slowest reader, as without a key.
        while not self.kept and self.num_bytes > WINDOW_BYTES:
            if not self._readers:
                raise ConnectionResetError(
                    "its client is gone, and the answer is too long to be kept"
                )
            await self._changed.wait()

    async def end(self, last: bytes = b"") -> None:
        if last:
            await self.write(last)
        self._has_ended = True
        self._tell()

    async def fail(self, error: BaseException) -> None:
        self._stream_error = _light(error)
        await self.end()

    async def answer(self, response: web.Response) -> None:
        """Take an answer that is no stream."""
        assert isinstance(response.body, bytes)
        self._response = response
        self._grow(len(response.body))
        await self.end()

    async def give_up(self, error: Exception) -> None:
        """Tell those who wait why there is no answer."""
        if not self._readers:
            logger.warning("the request of a client that is gone failed: %s", error)
        self._error = _light(error)
        await self.end()

    async def repeat(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        """Tell a client all of the answer.

        Raises what its making raised, RequestError when its beginning is forgotten, OverloadedError
        when many are told already.
        """
        if not self.kept:
            message = (
                "the answer is too long to be repeated; wait for the first request, or ask with "
                "another key"
            )
            raise RequestError(
                message, status=409, param=IDEMPOTENCY_KEY_HEADER, code="answer_too_long_to_repeat"
            )
        if len(self._readers) >= MAX_READERS:
            message = (
                f"{MAX_READERS} connections are being told this answer; read it there, or ask again"
            )
            raise OverloadedError(message, code="too_many_repeats")
        reader = _Reader()
        self._readers.add(reader)
        try:
            while not self.has_begun and not self._has_ended:
                await self._changed.wait()
            headers = headers | self._headers
            if self._error is not None:
                raise self._error
            if self._response is not None:
                made = self._response
                return web.Response(
                    status=made.status,
                    body=made.body,
                    content_type=made.content_type,
                    headers=headers,
                )
            return await self._stream_to(reader, ClientStream(request, headers))
        finally:
            self._readers.discard(reader)
            self._forget()

    async def _stream_to(self, reader: _Reader, stream: ClientStream) -> web.StreamResponse:
        while True:
            events = _first(self._events, reader.position - self._num_forgotten)
            if events:
                await stream.write(b"".join(events))
                reader.position += len(events)
                self._forget()
            elif self._has_ended:
                break
            else:
                await self._changed.wait()
        if self._stream_error is not None:
            await stream.fail(self._stream_error)
        else:
            await stream.end()
        return stream.response

    def _grow(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if not self._account(self, num_bytes) and self.kept:
            self.kept = False
            self._forget()

    def _forget(self) -> None:
        """Drop what all readers have, where it is not kept for others."""
        if not self.kept and self._readers:
            num_read = min(reader.position for reader in self._readers) - self._num_forgotten
            num_bytes = sum(len(event) + _EVENT_OVERHEAD_BYTES for event in self._events[:num_read])
            del self._events[:num_read]
            self._num_forgotten += num_read
            self.num_bytes -= num_bytes
            self._account(self, -num_bytes)
        self._tell()

    def _tell(self) -> None:
        # A new event each time: no reader can miss news by clearing what another one waits for.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _light(error: E) -> E:
    """Return the error without its traceback, which keeps the request's body alive.

    An unexpected error keeps it for the log.
    """
    return error.with_traceback(None) if isinstance(error, PdlaunchError) else error


def _first(events: list[bytes], start: int) -> list[bytes]:
    """Return the events from ``start`` on that fill a window, at least one if there is one."""
    end = start
    num_bytes = 0
    while end < len(events) and num_bytes < WINDOW_BYTES:
        num_bytes += len(events[end])
        end += 1
    return events[start:end]


class Repeats:
    """Holds the recordings of a router, the least recently used first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recordings: OrderedDict[bytes, Recording] = OrderedDict()
        self._num_bytes = 0
        self._runs: set[asyncio.Task[None]] = set()

    async def answer(
        self,
        key: IdempotencyKey,
        request: web.Request,
        body: bytes,
        headers: dict[str, str],
        work: Work,
    ) -> web.StreamResponse:
        """Do the work, or tell what it came to when it was done before.

        Raises what ``work`` raises, and RequestError when the key was used for another request.
        """
        self._drop_expired()
        content = _digest(request.path, body)
        name = _digest(
            request.headers.get("Authorization", ""), key.encode(errors="surrogateescape")
        )
        recording = self._recordings.get(name)
        if recording is None:
            recording = self._begin(name, content, work)
        elif recording.content != content:
            message = (
                f"{IDEMPOTENCY_KEY_HEADER} was used for another request; a request that differs "
                "needs a key of its own"
            )
            raise RequestError(
                message, status=422, param=IDEMPOTENCY_KEY_HEADER, code="idempotency_key_reused"
            )
        else:
            self._recordings.move_to_end(name)
            headers = headers | {REPLAYED_HEADER: "true"}
        return await recording.repeat(request, headers)

    def _begin(self, name: bytes, content: bytes, work: Work) -> Recording:
        recording = self._recordings[name] = Recording(name, content, self._account)
        # The client may go away: what it has asked for goes on.
        run = asyncio.create_task(self._run(recording, work))
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        return recording

    async def _run(self, recording: Recording, work: Work) -> None:
        try:
            response = await work(recording)
            if response is not None:
                await recording.answer(response)
        except Exception as error:
            await recording.give_up(error)
        finally:
            recording.ended_at = self._clock()
            # A failure is not repeated: who asks again shall have another try.
            if not (recording.has_succeeded and recording.kept):
                self._drop(recording)
            self._make_room()

    def _account(self, recording: Recording, num_bytes: int) -> bool:
        if self._recordings.get(recording.name) is recording:
            self._num_bytes += num_bytes
        return recording.num_bytes <= MAX_ANSWER_BYTES and self._make_room()

    def _make_room(self) -> bool:
        """Drop answers that are over, until the others fit; False when they do not."""
        if self._is_full():
            for recording in [
                each for each in self._recordings.values() if each.ended_at is not None
            ]:
                if self._is_full():
                    self._drop(recording)
        return self._num_bytes <= MAX_BYTES

    def _is_full(self) -> bool:
        return self._num_bytes > MAX_BYTES or len(self._recordings) > MAX_KEPT

    def _drop_expired(self) -> None:
        oldest_at = self._clock() - KEEP_S
        for recording in list(self._recordings.values()):
            if recording.ended_at is not None and recording.ended_at <= oldest_at:
                self._drop(recording)

    def _drop(self, recording: Recording) -> None:
        del self._recordings[recording.name]
        self._num_bytes -= recording.num_bytes


def _digest(name: str, content: bytes) -> bytes:
    digest = hashlib.sha256(name.encode(errors="surrogateescape"))
    digest.update(b"\0" + content)
    return digest.digest()
