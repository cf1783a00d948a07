"""Limits the work of an HTTP process: requests in flight, their time, the bytes of their bodies,
and how many large inputs are parsed at once. For use in the event loop only.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import unavailable
from pdlaunch.protocol.openai.requests import MAX_CHOICES

BODY_TIMEOUT_S = 60.0
BODY_SILENCE_S = 15.0  # longest wait for the next piece of a body
NUM_BODIES = 8  # of the largest size, which all requests in flight may hold together
SMALL_BODY_BYTES = 256 * 1024
LARGE_SHARE = 3 / 4  # share of the budget for large bodies; the rest is for small ones
ROUTER_ADDS_BYTES = 1024**2  # what a router adds: kv_transfer_params, first tokens, a seed
RESUMED_TOKEN_BYTES = len('{"token_id":2147483647},')
# Parsing a body, or tokenizing a text, of these sizes takes about 1 ms; using a thread costs 0.1 ms
LARGE_BODY_BYTES = 64 * 1024
LARGE_TEXT_BYTES = 4 * 1024
NUM_INPUT_THREADS = 2  # bounds memory: each thread holds the working memory of one large input

T = TypeVar("T")
# Raises the reservation to a total number of places; the text is the field to name in an error
Grow = Callable[[int, str], None]
# Makes the error for requests that arrive or still run while the process shuts down
ShuttingDown = Callable[[], OverloadedError]
# ``async with deadline()`` runs a block under the deadline of its request
Deadline = Callable[[], contextlib.AbstractAsyncContextManager[None]]


class Admission:
    """Admits requests up to a limit of requests in flight, and none while the process drains."""

    def __init__(self, limit: int, shutting_down: ShuttingDown) -> None:
        self.limit = limit
        self.in_flight = 0
        self.is_draining = False
        self._shutting_down = shutting_down
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, size: int = 1) -> Iterator[Grow]:
        """Hold ``size`` places while the block runs, one for each choice; yield ``grow``."""
        held = 0

        def grow(size: int, param: str) -> None:
            nonlocal held
            if size > self.limit:
                message = (
                    f"{param}: {size} choices in one request, but at most {self.limit} are served "
                    "at a time"
                )
                raise RequestError(message, param=param)
            if self.in_flight + size - held > self.limit:
                message = (
                    f"{self.in_flight} requests of all clients are in flight; at most {self.limit} "
                    "are served at a time"
                )
                raise OverloadedError(message, code="too_many_requests")
            self.in_flight += size - held
            held = size

        self.check_open()
        grow(size, "prompt")
        self._idle.clear()
        try:
            yield grow
        finally:
            self.in_flight -= held
            if self.in_flight == 0:
                self._idle.set()

    def check_open(self) -> None:
        if self.is_draining:
            raise self._shutting_down()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for running ones; return False after ``timeout_s``."""
        self.is_draining = True
        return await self.wait_idle(timeout_s)

    async def wait_idle(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()


class Interrupts:
    """Ends guarded blocks: each at its own deadline, or all at once."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()

    def end_all(self) -> None:
        for timeout in self._running:
            # An expired time-out cannot be rescheduled; its block is ending already.
            if not timeout.expired():
                timeout.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def guard(
        self, end_at: float | None, reason: Callable[[], Exception]
    ) -> AsyncIterator[None]:
        """Run the block. If ``end_at`` (loop time) or ``end_all`` ends it, raise ``reason()``."""
        timeout = asyncio.timeout_at(end_at)
        try:
            async with timeout:
                self._running.add(timeout)
                try:
                    yield
                finally:
                    self._running.discard(timeout)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise reason() from error


@dataclass(eq=False, slots=True)
class Deadlines:
    """Starts the deadlines of requests; ``close`` ends all requests."""

    limit_s: float
    shutting_down: ShuttingDown
    _interrupts: Interrupts = field(default_factory=Interrupts)
    _is_closed: bool = False

    def close(self) -> None:
        self._is_closed = True
        self._interrupts.end_all()

    def start(self) -> Deadline:
        """Start the deadline of one request now; its phases run under it one after another."""
        end_at = asyncio.get_running_loop().time() + self.limit_s

        def deadline() -> contextlib.AbstractAsyncContextManager[None]:
            if self._is_closed:
                raise self.shutting_down()
            return self._interrupts.guard(end_at, self._reason)

        return deadline

    def _reason(self) -> OverloadedError:
        if self._is_closed:
            return self.shutting_down()
        message = f"the request was not answered within {self.limit_s:g} s"
        return unavailable(message, "request_timeout")


@dataclass(eq=False, slots=True)
class BodyBudget:
    """Limits the bytes of request bodies that a process holds.

    A body counts from its first byte, with its Content-Length or the bytes so far (the larger).
    If it does not fit, it is refused with 503 at once: waiting bodies would hold connections, and
    the client knows better whether to try again.
    """

    max_bytes: int
    max_body_bytes: int
    held_bytes: int = 0

    @contextlib.asynccontextmanager
    async def read(self, http: web.Request) -> AsyncIterator[bytes]:
        """Read a body; its bytes count until the block ends. Raises RequestError."""
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            if num_bytes > self.max_body_bytes:
                message = f"the body is longer than {self.max_body_bytes} bytes"
                raise RequestError(message, status=413, code="body_too_large")
            most = self.max_bytes * (1.0 if num_bytes <= SMALL_BODY_BYTES else LARGE_SHARE)
            if num_bytes > held and self.held_bytes + num_bytes - held > most:
                message = (
                    f"bodies of requests in flight hold {self.held_bytes} bytes; another one of "
                    f"{num_bytes} bytes would exceed their limit of {most:.0f}, which follows from "
                    "limits.max_body_bytes"
                )
                raise OverloadedError(message, status=503, code="too_many_bytes_in_flight")
            self.held_bytes += max(0, num_bytes - held)
            held = max(held, num_bytes)

        try:
            # Check the Content-Length before reading: a large body must fit from the start.
            hold(http.content_length or 0)
            yield await _read(http, hold)
        finally:
            self.held_bytes -= held


async def _read(http: web.Request, hold: Callable[[int], None]) -> bytes:
    # Not a list of pieces: freeing them would leave holes in the heap.
    body = bytearray()
    now = asyncio.get_running_loop().time
    end_at = now() + BODY_TIMEOUT_S
    try:
        async with asyncio.timeout_at(now() + BODY_SILENCE_S) as timeout:
            while piece := await http.content.readany():
                timeout.reschedule(min(end_at, now() + BODY_SILENCE_S))
                hold(len(body) + len(piece))
                body += piece
        return bytes(body)
    except TimeoutError:
        message = (
            f"only {len(body)} bytes of the body arrived; send all of it within "
            f"{BODY_TIMEOUT_S:g} s, without pauses of {BODY_SILENCE_S:g} s"
        )
        raise RequestError(message, status=408, code="body_timeout") from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body cannot be read: {error}", code="invalid_body") from None


def engine_bodies(max_body_bytes: int, max_model_len: int) -> BodyBudget:
    """Return the limits of an engine whose router admits bodies of ``max_body_bytes``."""
    # To continue an answer at another engine, a router adds all tokens so far, for each choice.
    added_bytes = ROUTER_ADDS_BYTES + RESUMED_TOKEN_BYTES * MAX_CHOICES * max_model_len
    longest = max_body_bytes + added_bytes
    # Room for the bodies that a router admits, and for two of the longest that it can send.
    return BodyBudget(NUM_BODIES * max_body_bytes + 2 * longest, longest)


_input_threads = ThreadPoolExecutor(NUM_INPUT_THREADS, thread_name_prefix="large-input")


async def work_at_input(is_large: bool, work: Callable[[], T]) -> T:
    """Return the result of ``work``; run it in a thread if ``is_large``, to free the event loop."""
    if not is_large:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_input_threads, work)
