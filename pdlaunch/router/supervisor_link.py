"""Asks the supervisor, for commands that only it can do."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable

import msgspec

from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.control import Answered, ChangeEngines, Restart, SetDrained

ANSWER_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 850.0
"""A change of the engines must be done by then; commands wait a little longer."""

Question = Restart | SetDrained | ChangeEngines


class SupervisorLink:
    """Matches answers with questions; belongs to the event loop. ``send`` does not wait."""

    def __init__(self, send: Callable[[Question], None]) -> None:
        self._send = send
        # An answer to a router that has died is none to this one.
        self._numbers = itertools.count(secrets.randbits(40))
        self._asked: dict[int, asyncio.Queue[Answered]] = {}

    async def restart(self, name: str) -> Answered:
        """Return when an engine's restart has begun, or was refused. Raises OverloadedError."""
        (answer,) = await self._ask(Restart(question=next(self._numbers), name=name))
        return answer

    async def set_drained(self, name: str, *, is_drained: bool) -> Answered:
        """Have an engine given no new work, or work again. Raises OverloadedError."""
        question = SetDrained(question=next(self._numbers), name=name, is_drained=is_drained)
        (answer,) = await self._ask(question)
        return answer

    async def change(self, wanted: ChangeEngines) -> Answered:
        """Return when the engines of the launch have been changed, or that was refused, with what
        was planned. ``wanted.question`` is set here. Raises OverloadedError.
        """
        question = msgspec.structs.replace(wanted, question=next(self._numbers))
        begun, *ended = await self._ask(question)
        return (
            msgspec.structs.replace(begun, error=ended[0].error, is_done=True) if ended else begun
        )

    def answered(self, message: Answered) -> None:
        """Hand an answer to the call that waits for it, if one still does."""
        if (answers := self._asked.get(message.question)) is not None:
            answers.put_nowait(message)

    async def _ask(self, question: Question) -> list[Answered]:
        """Return the answer, and a second one where the first says that it follows."""
        answers: asyncio.Queue[Answered] = asyncio.Queue()
        self._asked[question.question] = answers
        try:
            self._send(question)
            message = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s"
            first = await _next(answers, ANSWER_TIMEOUT_S, message, "no_answer")
            if first.is_done:
                return [first]
            message = f"it is not done after {CHANGE_TIMEOUT_S:g} s, and goes on"
            return [first, await _next(answers, CHANGE_TIMEOUT_S, message, "not_ready")]
        finally:
            del self._asked[question.question]


async def _next(
    answers: asyncio.Queue[Answered], timeout_s: float, message: str, code: str
) -> Answered:
    try:
        async with asyncio.timeout(timeout_s):
            return await answers.get()
    except TimeoutError:
        raise OverloadedError(message, status=503, code=code) from None
