"""Limits what an HTTP process takes on: requests in flight, their time, the bytes of their bodies,
and how many large inputs are worked at. All belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import RETRY_AFTER_S
from pdlaunch.protocol.openai.requests import MAX_CHOICES

BODY_TIMEOUT_S = 60.0
BODY_SILENCE_S = 15.0  # time within which the next piece of a body must come
SMALL_BODY_BYTES = 256 * 1024
LARGE_SHARE = 3 / 4  # of the budget, for large bodies: small ones keep the rest
ROUTER_ADDS_BYTES = 1024**2  # kv_transfer_params with block ids and first tokens, a seed
RESUMED_TOKEN_BYTES = len('{"token_id":2147483647},')
LARGE_BODY_BYTES = 64 * 1024
# From here on parsing, or tokenizing, takes about a millisecond; a thread costs 0.1 ms
LARGE_TEXT_BYTES = 4 * 1024
NUM_INPUT_THREADS = 2  # bounds the memory of large work, which each thread needs once

T = TypeVar("T")
# Reserves this many places in all; the text is the field to name in an error
Grow = Callable[[int, str], None]
# Makes the error for requests that come, or still run, while the process leaves
ShuttingDown = Callable[[], OverloadedError]
# Limits what runs under ``async with deadline()``
Deadline = Callable[[], contextlib.AbstractAsyncContextManager[None]]


class Admission:
    """Admits requests up to a limit of those in flight, and none while the process drains."""

    def __init__(self, limit: int, shutting_down: ShuttingDown) -> None:
        self.limit = limit
        self.in_flight = 0
        self.is_draining = False
        self._shutting_down = shutting_down
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self, size: int = 1) -> Iterator[Grow]:
        """Hold ``size`` places while the block runs, one for each choice; yield what takes more.

        Raises OverloadedError (503 while draining, 429 when full), or RequestError when the request
        alone exceeds the limit.
        """
        held = 0

        def grow(size: int, param: str) -> None:
            nonlocal held
            if size > self.limit:
                raise RequestError(
                    f"{param}: {size} choices in one request, but at most {self.limit} are served "
                    "at a time",
                    param=param,
                )
            if self.in_flight + size - held > self.limit:
                raise OverloadedError(
                    f"{self.in_flight} requests are in flight; at most {self.limit} of all clients "
                    "are served at a time",
                    code="too_many_requests",
                )
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
        """Raise OverloadedError (503) while the process drains."""
        if self.is_draining:
            raise self._shutting_down()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what comes and wait for what runs; False when ``timeout_s`` was too short."""
        self.is_draining = True
        return await self.wait_idle(timeout_s)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when ``timeout_s`` was too short."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()


class Interrupts:
    """Ends the blocks that run under it, each at its own instant or all at once."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()

    def __bool__(self) -> bool:
        return bool(self._running)

    def end_all(self) -> None:
        for timeout in self._running:
            # One that has just expired cannot be moved any more; it ends anyway.
            if not timeout.expired():
                timeout.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def guard(
        self, end_at: float | None, reason: Callable[[], Exception]
    ) -> AsyncIterator[None]:
        """Run the block, until ``end_at`` at most. Raises ``reason()`` when it is ended."""
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


class Deadlines:
    """Starts the deadlines of a process's requests; ``close`` ends all of them."""

    def __init__(self, limit_s: float, shutting_down: ShuttingDown) -> None:
        self._limit_s = limit_s
        self._shutting_down = shutting_down
        self._interrupts = Interrupts()
        self._is_closed = False

    def close(self) -> None:
        """End what runs and all that comes. Safe to call twice."""
        self._is_closed = True
        self._interrupts.end_all()

    def start(self) -> Deadline:
        """Start the deadline of one request now; its parts run under it one after another."""
        end_at = asyncio.get_running_loop().time() + self._limit_s

        def deadline() -> contextlib.AbstractAsyncContextManager[None]:
            if self._is_closed:
                raise self._shutting_down()
            return self._interrupts.guard(end_at, self._reason)

        return deadline

    def _reason(self) -> OverloadedError:
        if self._is_closed:
            return self._shutting_down()
        return OverloadedError(
            f"the request was not answered within {self._limit_s:g} s",
            status=503,
            retry_after_s=RETRY_AFTER_S,
            code="request_timeout",
        )


class BodyBudget:
    """Counts the bytes of the bodies that a process holds.

    A body counts from its first byte, with its stated length or the bytes so far (the larger).
    A body without room is answered 503 at once: waiting bodies would hold connections, and the
    client knows better whether to try again.
    """

    def __init__(self, max_bytes: int, max_body_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_body_bytes = max_body_bytes
        self.held_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, http: web.Request) -> AsyncIterator[bytes]:
        """Read a body and hold its room while the block runs.

        Raises RequestError (400, 408, 413), OverloadedError (503).
        """
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            self._check_room(num_bytes, held)
            self.held_bytes += max(0, num_bytes - held)
            held = max(held, num_bytes)

        try:
            # Before a byte is read: whoever states much must find room for it first.
            hold(http.content_length or 0)
            yield await _read(http, hold)
        finally:
            self.held_bytes -= held

    def _check_room(self, num_bytes: int, held: int) -> None:
        if num_bytes > self.max_body_bytes:
            raise RequestError(
                f"the body is longer than {self.max_body_bytes} bytes",
                status=413,
                code="body_too_large",
            )
        share = 1.0 if num_bytes <= SMALL_BODY_BYTES else LARGE_SHARE
        if num_bytes > held and self.held_bytes + num_bytes - held > self.max_bytes * share:
            raise OverloadedError(
                f"requests in flight hold {self.held_bytes} bytes; there is no room for "
                f"another body of {num_bytes} bytes "
                f"in {self.max_bytes}, which follow from limits.max_body_bytes",
                status=503,
                code="too_many_bytes_in_flight",
            )


async def _read(http: web.Request, hold: Callable[[int], None]) -> bytes:
    # Not a list of pieces: freed between others, these would leave holes in the heap.
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
        raise RequestError(
            f"{len(body)} bytes of the body came; it must be there within {BODY_TIMEOUT_S:g} s, "
            f"without pauses of {BODY_SILENCE_S:g} s",
            status=408,
            code="body_timeout",
        ) from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body cannot be read: {error}", code="invalid_body") from None


def max_engine_body_bytes(max_body_bytes: int, max_model_len: int) -> int:
    """Return the longest body that a router may send to an engine.

    That is a client's and what the router adds: to continue an answer elsewhere, all of its tokens
    so far, for each choice.
    """
    return max_body_bytes + ROUTER_ADDS_BYTES + RESUMED_TOKEN_BYTES * MAX_CHOICES * max_model_len


_input_threads = ThreadPoolExecutor(NUM_INPUT_THREADS, thread_name_prefix="large-input")


async def work_at_input(is_large: bool, work: Callable[[], T]) -> T:
    """Do ``work``, in a thread when its input is large, so that the event loop turns meanwhile."""
    if not is_large:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_input_threads, work)
