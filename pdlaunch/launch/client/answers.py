"""Bounds what a server may answer, which need not be one of pdlaunch, in bytes and in time.

The timeout of ``http.client`` counts for each read from the socket alone: a server that sends a
byte each second is read for ever.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from typing import Any

MAX_ANSWER_BYTES = 64 << 20
"""Limit of one answer, its headers included."""


class BadAnswerError(http.client.HTTPException):
    """An answer cannot be read; the message goes on where the server's URL was named."""


class StreamRequest(urllib.request.Request):
    """Asks for a stream, which may take long: only its silence counts against the timeout."""


class BoundedAnswers(urllib.request.AbstractHTTPHandler):
    """Has every answer bounded; goes before a handler of urllib."""

    def do_open(
        self, http_class: Any, req: urllib.request.Request, **options: Any
    ) -> http.client.HTTPResponse:
        def connection_to(host: str, **given: Any) -> http.client.HTTPConnection:
            connection: http.client.HTTPConnection = http_class(host, **given)
            is_stream = isinstance(req, StreamRequest)
            connection.response_class = _BoundedResponse if is_stream else _TimedResponse
            return connection

        return super().do_open(connection_to, req, **options)


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Takes errors for answers, and redirects, too: urllib would send the key on to whatever host
    they name.
    """

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def read_answer(response: http.client.HTTPResponse) -> bytes:
    """Return the whole body. Raises BadAnswerError, another HTTPException or OSError."""
    try:
        # With a limit: what the headers promise is allocated at once.
        content = response.read(MAX_ANSWER_BYTES)
    except (http.client.IncompleteRead, ValueError):
        raise BadAnswerError("breaks off its answer") from None
    if response.length:
        raise BadAnswerError("breaks off its answer")
    return content


class _BoundedResponse(http.client.HTTPResponse):
    has_deadline = False

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        # Below the buffer, everything counts: headers, sizes of chunks, trailers.
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock, self.has_deadline))


class _TimedResponse(_BoundedResponse):
    has_deadline = True


class _Reader(io.RawIOBase):
    """Reads from ``raw``, which reads from ``sock``, whose timeout is that of the whole answer."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, has_deadline: bool) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout_s = sock.gettimeout() if has_deadline else None
        self._deadline_at = time.monotonic() + (self._timeout_s or 0.0)
        self._left_bytes = MAX_ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._read_in_time(buffer)
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise BadAnswerError(f"answers with more than {MAX_ANSWER_BYTES >> 20} MiB")
        return num_bytes

    def _read_in_time(self, buffer: Any) -> int:
        if self._timeout_s is None:
            return self._raw.readinto(buffer) or 0
        left_s = self._deadline_at - time.monotonic()
        try:
            if left_s <= 0.0:
                raise TimeoutError
            self._sock.settimeout(left_s)
            return self._raw.readinto(buffer) or 0
        except TimeoutError:
            raise BadAnswerError(f"has not answered in full within {self._timeout_s:g} s") from None

    def close(self) -> None:
        self._raw.close()
        super().close()
