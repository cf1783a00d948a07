"""Server-sent events: one ``data:`` line an event, as OpenAI streams them, and ``[DONE]`` at the
end.
"""

from __future__ import annotations

import msgspec

from pdlaunch.errors import ProtocolError
from pdlaunch.protocol.openai.errors import error_body

DONE = b"data: [DONE]\n\n"
DONE_DATA = b"[DONE]"
CONTENT_TYPE = "text/event-stream"
MAX_EVENT_BYTES = 16 * 1024**2

_encoder = msgspec.json.Encoder()


def encode_event(payload: object) -> bytes:
    """One event; ``payload`` is a struct of ``responses`` or anything that msgspec encodes."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def encode_error(error: BaseException) -> bytes:
    """The event that ends a stream which failed after its headers were sent; no ``[DONE]``
    follows.
    """
    return encode_event(error_body(error))


class EventDecoder:
    """Cuts a byte stream into the data of its events, wherever the stream was split."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Data of the events that ``received`` completes, ``DONE_DATA`` among them.

        Raises ProtocolError when an event exceeds ``MAX_EVENT_BYTES``.
        """
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return [
            event for line in lines if (event := self._take(line.removesuffix(b"\r"))) is not None
        ]

    def _take(self, line: bytes) -> bytes | None:
        """The event that an empty line ends; comments and members other than ``data`` are
        dropped.
        """
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            event, self._data = b"\n".join(self._data), []
            return event
        return None
