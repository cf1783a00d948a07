"""Commands that change which engines of a launch are given work, or which there are.

The router asks for somebody who may; the supervisor answers with ``Answered``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdlaunch.protocol.wire import Message

Withheld = Literal["", "joining", "draining"]
"""The reason why an engine that is ready is given no new work: its pairs are yet to be proven, or
somebody drains it.
"""
RefusalCode = Literal["engine_not_found", "not_now", "refused"]


class SetDrained(Message):
    """Asks to give an engine no new work, or to give it work again."""

    question: int
    """Comes back with the answer."""
    name: str
    """Names the engine, or one of its processes."""
    is_drained: bool


class Answered(Message):
    """Answers one of these commands: it is done or has begun, or ``error`` says why not."""

    question: int
    engine: str = ""
    """The engine that was named."""
    error: str = ""
    code: RefusalCode = "refused"
    """The kind of the error, if there is one."""
    notes: list[str] = msgspec.field(default_factory=list)
    """What whoever asked should know."""
