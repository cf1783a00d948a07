"""Asks the supervisor, for commands that only it can do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Callable

import msgspec

from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.changes import Answered, ChangeEngines, SetDrained
from pdlaunch.protocol.control import Restart, Restarting

ANSWER_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 850.0
"""A change of the engines must be done by then; commands wait a little longer."""

Question = Restart | SetDrained | ChangeEngines
Answer = Restarting | Answered


class SupervisorLink:
    """Matches answers with questions; belongs to the event loop. ``send`` does not wait."""

    def __init__(self, send: Callable[[Question], None]) -> None:
        self._send = send
        # An answer to a router that has died is none to this one.
        self._numbers = itertools.count(secrets.randbits(40))
        self._asked: dict[int, asyncio.Queue[Answer]] = {}

    async def restart(self, name: str) -> Restarting:
        """Have an engine started anew; returns when that has begun, or was refused. Raises
        OverloadedError.
        """
        async with self._asking(Restart(question=next(self._numbers), name=name)) as answers:
            answer = await _next(answers)
        assert isinstance(answer, Restarting)
        return answer

    async def set_drained(self, name: str, *, is_drained: bool) -> Answered:
        """Have an engine given no new work, or work again. Raises OverloadedError."""
        question = SetDrained(question=next(self._numbers), name=name, is_drained=is_drained)
        async with self._asking(question) as answers:
            answer = await _next(answers)
        assert isinstance(answer, Answered)
        return answer

    async def change(self, wanted: ChangeEngines) -> Answered:
        """Have the engines of the launch changed; returns when that is done, or was refused, with
        what was planned. ``wanted.question`` is set here. Raises OverloadedError.
        """
        question = msgspec.structs.replace(wanted, question=next(self._numbers))
        async with self._asking(question) as answers:
            begun = await _next(answers)
            assert isinstance(begun, Answered)
            if begun.is_done:
                return begun
            try:
                async with asyncio.timeout(CHANGE_TIMEOUT_S):
                    ended = await answers.get()
            except TimeoutError:
                message = f"it is not done after {CHANGE_TIMEOUT_S:g} s, and goes on"
                raise OverloadedError(message, status=503, code="not_ready") from None
        return msgspec.structs.replace(begun, error=ended.error, is_done=True)

    def answered(self, message: Answer) -> None:
        """Hand an answer to the call that waits for it, if one still does."""
        if (answers := self._asked.get(message.question)) is not None:
            answers.put_nowait(message)

    @contextlib.asynccontextmanager
    async def _asking(self, question: Question) -> AsyncIterator[asyncio.Queue[Answer]]:
        """Send a question; its answers come while the block runs."""
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._asked[question.question] = answers
        try:
            self._send(question)
            yield answers
        finally:
            del self._asked[question.question]


async def _next(answers: asyncio.Queue[Answer]) -> Answer:
    """Return the first answer, which does not take long. Raises OverloadedError."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await answers.get()
    except TimeoutError:
        message = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s"
        raise OverloadedError(message, status=503, code="no_answer") from None
