"""Asks the supervisor, for commands that only it can do."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable

import msgspec

from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.control import Answered, Command

ANSWER_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 850.0
"""A change of the engines must be done by then; commands wait a little longer."""


class SupervisorLink:
    """Matches answers with commands; belongs to the event loop. ``send`` does not wait."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        # An answer to a router that has died is none to this one.
        self._numbers = itertools.count(secrets.randbits(40))
        self._asked: dict[int, asyncio.Queue[Answered]] = {}

    async def ask(self, command: Command) -> Answered:
        """Return the answer, once the change is done if it is one; ``command.question`` is set
        here. Raises OverloadedError.
        """
        command = msgspec.structs.replace(
            command,
            question=next(self._numbers),
            expires_at=time.monotonic() + ANSWER_TIMEOUT_S,
        )
        answers = self._asked[command.question] = asyncio.Queue()
        timeout_s, code = ANSWER_TIMEOUT_S, "no_answer"
        message = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s"
        try:
            self._send(command)
            async with asyncio.timeout(timeout_s):
                begun = await answers.get()
            if begun.is_done:
                return begun
            timeout_s, code = CHANGE_TIMEOUT_S, "not_ready"
            message = f"it is not done after {CHANGE_TIMEOUT_S:g} s, and goes on"
            async with asyncio.timeout(timeout_s):
                ended = await answers.get()
            return msgspec.structs.replace(begun, error=ended.error, is_done=True)
        except TimeoutError:
            raise OverloadedError(message, status=503, code=code) from None
        finally:
            del self._asked[command.question]

    def answered(self, message: Answered) -> None:
        """Hand an answer to the call that waits for it, if one still does."""
        if (answers := self._asked.get(message.question)) is not None:
            answers.put_nowait(message)
