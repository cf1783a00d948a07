"""Questions of the router to its supervisor, over the control channel."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable

from pdlaunch.errors import OverloadedError
from pdlaunch.protocol.control import Restart, Restarting

ANSWER_TIMEOUT_S = 10.0


class SupervisorLink:
    """Matches answers with questions; belongs to the event loop. ``send`` does not wait."""

    def __init__(self, send: Callable[[Restart], None]) -> None:
        self._send = send
        # An answer to a router that has died is none to this one.
        self._numbers = itertools.count(secrets.randbits(40))
        self._asked: dict[int, asyncio.Future[Restarting]] = {}

    async def restart(self, name: str) -> Restarting:
        """Have an engine started anew; returns when that has begun, or was refused. Raises
        OverloadedError.
        """
        question = next(self._numbers)
        answer: asyncio.Future[Restarting] = asyncio.get_running_loop().create_future()
        self._asked[question] = answer
        self._send(Restart(question=question, name=name))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            message = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s"
            raise OverloadedError(message, status=503, code="no_answer") from None
        finally:
            del self._asked[question]

    def answered(self, message: Restarting) -> None:
        """Hand an answer to who waits for it, if anybody still does."""
        answer = self._asked.get(message.question)
        if answer is not None and not answer.done():
            answer.set_result(message)
