"""Encodes typed messages as msgpack frames, and refuses malformed frames."""

from typing import Generic, TypeVar

import msgspec

from pdlaunch.errors import ProtocolError

# Longest frame that a socket accepts; ZMQ closes the connection of a peer that sends a longer one
MAX_FRAME_BYTES = 64 * 1024**2

M = TypeVar("M")


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base class of messages between processes; its name is the tag in the channel's union."""


class Codec(Generic[M]):
    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: M) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes | memoryview) -> M:
        """Return the message in a frame. Raises ProtocolError if the channel does not have it."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"malformed message of {len(frame)} bytes: {error}") from None
