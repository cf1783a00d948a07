"""Asks the supervisor, for commands that only it can do."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable

from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.changes import Answered, SetDrained
from pdlaunch.protocol.control import Restart, Restarting

ANSWER_TIMEOUT_S = 10.0

Question = Restart | SetDrained
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
        answer = await self._ask(Restart(question=next(self._numbers), name=name))
        assert isinstance(answer, Restarting)
        return answer

    async def set_drained(self, name: str, *, is_drained: bool) -> Answered:
        """Have an engine given no new work, or work again. Raises OverloadedError."""
        question = SetDrained(question=next(self._numbers), name=name, is_drained=is_drained)
        answer = await self._ask(question)
        assert isinstance(answer, Answered)
        return answer

    def answered(self, message: Answer) -> None:
        """Hand an answer to the call that waits for it, if one still does."""
        if (answers := self._asked.get(message.question)) is not None:
            answers.put_nowait(message)

    async def _ask(self, question: Question) -> Answer:
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._asked[question.question] = answers
        try:
            self._send(question)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answers.get()
        except TimeoutError:
            message = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s"
            raise OverloadedError(message, status=503, code="no_answer") from None
        finally:
            del self._asked[question.question]
