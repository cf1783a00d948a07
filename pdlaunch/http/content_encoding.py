"""Compressed bodies: gzip and deflate, in pieces of bounded size, so that a small body cannot
become a large one unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from pdlaunch.errors import RequestError

PIECE_BYTES = 256 * 1024
_ZLIB, _GZIP, _RAW = zlib.MAX_WBITS, zlib.MAX_WBITS | 16, -zlib.MAX_WBITS
_CM_DEFLATE = 8
"""Lower half of the first byte of a zlib header; without it deflate came raw, as some clients send
it.
"""


class ContentDecoder:
    """Decodes nothing: the body is as it was sent."""

    def feed(self, sent: bytes) -> Iterator[bytes]:
        """The pieces that ``sent`` stands for. Raises RequestError."""
        yield sent

    def check_end(self) -> None:
        """Raises RequestError when the body has ended before its compressed stream."""


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
                piece = self._stream.decompress(sent, PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            yield piece
            sent = self._stream.unused_data or self._stream.unconsumed_tail
            # A full piece may leave some of its output inside the stream, of which nothing is left
            # to be sent.
            has_more = bool(sent) or (len(piece) == PIECE_BYTES and not self._stream.eof)

    def check_end(self) -> None:
        if self._stream is None or not self._stream.eof:
            raise self._broken("it ends in its middle")

    def _broken(self, reason: str) -> RequestError:
        return RequestError(f"the body is no valid {self._encoding}: {reason}", code="invalid_body")


def content_decoder(encoding: str) -> ContentDecoder:
    """The decoder for a Content-Encoding header. Raises RequestError (415)."""
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
