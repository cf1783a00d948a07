"""Reads bodies of requests within limits: their length, their time, and what all of them hold.

A body counts from its first byte: with the length that its header states, or with what it has come
to once it is decompressed, whichever is more. A router holds it until the request is answered,
because another engine may be asked; an engine until it has read token ids from it.

A body that finds no room is answered 503 at once instead of being made to wait: its client knows
better whether to try again, and bodies that wait would hold connections. Small bodies find room
when large ones do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator

from aiohttp import hdrs, web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.large_inputs import MemoryReturn
from pdlaunch.protocol.openai.requests import MAX_CHOICES

DECODED_PIECE_BYTES = 256 * 1024
_ZLIB, _GZIP, _RAW = zlib.MAX_WBITS, zlib.MAX_WBITS | 16, -zlib.MAX_WBITS
_CM_DEFLATE = 8
"""Lower half of the first byte of a zlib header; without it deflate came raw, as some clients send
it.
"""


class ContentDecoder:
    """Decodes nothing: the body is as it was sent."""

    def feed(self, sent: bytes) -> Iterator[bytes]:
        """Yield the pieces that ``sent`` stands for. Raises RequestError."""
        yield sent

    def check_end(self) -> None:
        """Raise RequestError when the body has ended before its compressed stream."""


class _Inflater(ContentDecoder):
    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._stream = None if encoding == "deflate" else zlib.decompressobj(_GZIP)

    def feed(self, sent: bytes) -> Iterator[bytes]:
        if self._stream is None:
            self._stream = zlib.decompressobj(_ZLIB if sent[0] & 0x0F == _CM_DEFLATE else _RAW)
        has_more = True
        while has_more:
            if self._stream.eof:
                raise self._broken("it goes on after its end")
            try:
                piece = self._stream.decompress(sent, DECODED_PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            yield piece
            sent = self._stream.unused_data or self._stream.unconsumed_tail
            # A full piece may leave some of its output inside the stream, of which nothing is left
            # to be sent.
            has_more = bool(sent) or (len(piece) == DECODED_PIECE_BYTES and not self._stream.eof)

    def check_end(self) -> None:
        if self._stream is None or not self._stream.eof:
            raise self._broken("it ends in its middle")

    def _broken(self, reason: str) -> RequestError:
        return RequestError(f"the body is no valid {self._encoding}: {reason}", code="invalid_body")


def content_decoder(encoding: str) -> ContentDecoder:
    """Return the decoder for a Content-Encoding header. Raises RequestError (415)."""
    match encoding.strip().lower():
        case "" | "identity":
            return ContentDecoder()
        case "gzip" | "x-gzip":
            return _Inflater("gzip")
        case "deflate":
            return _Inflater("deflate")
        case _:
            message = (
                f"Content-Encoding {encoding[:100]!r} is not supported; send gzip, deflate or no "
                "encoding"
            )
            raise RequestError(message, status=415, code="unsupported_encoding")


BODY_TIMEOUT_S = 60.0
"""Seconds within which a whole body must have come."""
BODY_SILENCE_S = 15.0
"""Seconds within which the next piece of a body must come."""
SMALL_BODY_BYTES = 256 * 1024
LARGE_SHARE = 3 / 4
"""Bodies that are not small get this share of the budget; the rest is left to small ones."""
ROUTER_ADDS_BYTES = 1024**2
"""A router adds at most this to a body that it sends on: kv_transfer_params with block ids and
first tokens, a seed.
"""
RESUMED_TOKEN_BYTES = len('{"token_id":2147483647},')


class BodyBudget:
    """Counts the bytes of bodies in flight in one process; belongs to the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._memory_return = MemoryReturn()

    @contextlib.contextmanager
    def hold(self, num_bytes: int = 0) -> Iterator[Hold]:
        """Hold room for a body while the block runs. Raises OverloadedError (503)."""
        hold = Hold(self)
        with hold.shared():
            hold.grow_to(num_bytes)
            yield hold

    def give_back(self, num_bytes: int) -> None:
        """Release the room of a body that is needed no more."""
        self.held_bytes -= num_bytes
        self._memory_return.after(num_bytes)


class Hold:
    """Holds the room of one body."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_users = 0
        self.num_bytes = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Keep the room while the block runs, which may outlive others that need the same body: the
        last one gives it back.
        """
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._budget.give_back(self.num_bytes)
                self.num_bytes = 0

    def grow_to(self, num_bytes: int) -> None:
        """Hold room for ``num_bytes`` in all; it never shrinks.

        Raises OverloadedError (503) when all bodies together have become too long.
        """
        more = max(0, num_bytes - self.num_bytes)
        budget = self._budget
        # The last quarter is left to small bodies, so that a few large ones lock nobody out.
        share = 1.0 if num_bytes <= SMALL_BODY_BYTES else LARGE_SHARE
        if more and budget.held_bytes + more > budget.max_bytes * share:
            raise OverloadedError(
                f"requests in flight hold {budget.held_bytes} bytes; there is no room for another "
                f"body of {num_bytes} bytes "
                f"(limits.max_body_bytes_in_flight is {budget.max_bytes})",
                status=503,
                code="too_many_bytes_in_flight",
            )
        budget.held_bytes += more
        self.num_bytes += more


async def read_body(http: web.Request, hold: Hold, *, max_bytes: int) -> bytes:
    """Read the body, decompressed: aiohttp has left it as it is (``HttpRunner``).

    Raises RequestError (400, 408, 413, 415), OverloadedError (503).
    """
    stated = http.content_length or 0
    _check_length(stated, max_bytes)
    # Before a byte is read: whoever states much must find room for it first.
    hold.grow_to(stated)
    decoder = content_decoder(http.headers.get(hdrs.CONTENT_ENCODING, ""))
    pieces: list[bytes] = []
    num_bytes = 0
    now = asyncio.get_running_loop().time
    end_at = now() + BODY_TIMEOUT_S
    try:
        async with asyncio.timeout_at(now() + BODY_SILENCE_S) as timeout:
            while sent := await http.content.readany():
                timeout.reschedule(min(end_at, now() + BODY_SILENCE_S))
                for piece in decoder.feed(sent):
                    num_bytes += len(piece)
                    _check_length(num_bytes, max_bytes)
                    hold.grow_to(num_bytes)
                    pieces.append(piece)
        decoder.check_end()
        return b"".join(pieces)
    except TimeoutError:
        raise RequestError(
            f"{num_bytes} bytes of the body came; it must be there within {BODY_TIMEOUT_S:g} s, "
            "without pauses of "
            f"{BODY_SILENCE_S:g} s",
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


def _check_length(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise RequestError(
            f"the body is longer than {max_bytes} bytes", status=413, code="body_too_large"
        )
