"""Puts an engine to sleep: nothing new comes in, what runs ends, then rank 0 is told.

::

    awake ── sleep ──▶ draining ── idle, rank 0 says yes ──▶ asleep ── wake_up: all tags ──▶ awake
                          └── refused, or out of time ──▶ awake

A caller that goes away changes nothing: what it has asked for goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from multidict import MultiMapping

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S
from pdlaunch.http.limits import Admission
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import Sleep, SleepReply, WakeUp

SLEEP_TAGS = ("weights", "kv_cache")


def _read_query(
    query: MultiMapping[str], known: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Return the values of each parameter, repeated or with commas. Raises RequestError.

    ``known``: the values that each may have.
    """
    found: dict[str, list[str]] = {name: [] for name in known}
    for name, text in query.items():
        if name not in known:
            message = f"unknown query parameter {name!r:.50}; there are {', '.join(known)}"
            raise RequestError(message, param="query")
        for value in text.split(","):
            if value not in known[name]:
                message = f"{name} must be {' or '.join(known[name])}, not {value!r:.50}"
                raise RequestError(message, param=name)
            found[name].append(value)
    return found


class SleepDesk:
    """Puts the engine to sleep and wakes it up, one call at a time.

    ``announce`` tells the supervisor, whose registry makes routers keep away.
    """

    def __init__(
        self, spec: EngineSpec, admission: Admission, link: Callable[[], RankLink]
    ) -> None:
        self._enabled = spec.enable_sleep_mode
        self._timeout_s = spec.limits.request_timeout_s
        self._admission = admission
        self._link = link
        self._turn = asyncio.Lock()
        self._tags: list[str] = []
        self._state = SleepState(state="awake")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.announce: Callable[[SleepState], None] = lambda _: None

    def check_awake(self) -> None:
        """Raise OverloadedError (503) while the engine sleeps, or is about to."""
        if self._state.state != "awake":
            raise OverloadedError(
                "the engine sleeps",
                status=503,
                retry_after_s=LEAVING_RETRY_AFTER_S,
                code="engine_sleeping",
            )

    def status(self, num_bytes: int = 0) -> dict[str, Any]:
        """Answer a call; ``num_bytes`` of device memory, over all ranks, it gave back or took."""
        tags = self._tags
        return {"is_sleeping": bool(tags), "sleeping_tags": tags, "num_bytes": num_bytes}

    def settle(self, tags: list[str], *, draining: bool = False) -> None:
        """Take over which pools sleep, also of a rank 0 that is not the one known so far."""
        self._tags = tags
        state = SleepState(state="draining" if draining else "sleeping" if tags else "awake")
        if state != self._state:
            self._state = state
            self.announce(state)

    async def fall_asleep(self, query: MultiMapping[str]) -> dict[str, Any]:
        """Take ``level=1|2`` (1 keeps the weights in host memory, 2 loads them again) and
        ``mode=wait|refuse``; answer when the engine sleeps.

        Raises RequestError: 400 without sleep mode, 409 while the engine is busy and the caller
        does not wait.
        """
        found = _read_query(query, {"level": ("1", "2"), "mode": ("wait", "refuse")})
        level, waits = int((found["level"] or ["1"])[-1]), "refuse" not in found["mode"]
        return await self._to_the_end(self._fall_asleep(level, waits))

    async def wake_up(self, query: MultiMapping[str]) -> dict[str, Any]:
        """Wake the pools of ``tags=weights&tags=kv_cache``, without tags all. Raises RequestError:
        400 without sleep mode, 409 when it fails.
        """
        tags = _read_query(query, {"tags": SLEEP_TAGS})["tags"]
        return await self._to_the_end(self._wake_up(list(dict.fromkeys(tags))))

    async def _fall_asleep(self, level: int, waits: bool) -> dict[str, Any]:
        if self._tags:
            return self.status()
        link = self._link()
        if not waits and self._admission.in_flight:
            raise _conflict(
                f"{self._admission.in_flight} requests are in flight; mode=wait waits for them"
            )
        timeout_s = self._timeout_s if waits else 0.0
        try:
            # The registry first keeps routers away; then what is here can come to its end.
            self.settle(self._tags, draining=True)
            if not await self._admission.wait_idle(self._timeout_s):
                raise _conflict(f"requests were still in flight after {self._timeout_s:g} s")
            return self._answer(
                await link.call(
                    lambda call_id: Sleep(call_id=call_id, level=level, timeout_s=timeout_s)
                )
            )
        finally:
            # The link has settled the tags of a reply; without one they are as before.
            self.settle(self._tags)

    async def _wake_up(self, tags: list[str]) -> dict[str, Any]:
        if not self._tags:
            return self.status()
        return self._answer(
            await self._link().call(lambda call_id: WakeUp(call_id=call_id, tags=tags))
        )

    def _answer(self, reply: SleepReply) -> dict[str, Any]:
        if reply.error is not None:
            raise _conflict(reply.error)
        return self.status(reply.num_bytes)

    async def _to_the_end(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        async def in_turn() -> dict[str, Any]:
            async with self._turn:
                return await work

        if not self._enabled:
            work.close()
            raise RequestError(
                "this engine cannot sleep: enable_sleep_mode is off", code="sleep_mode_off"
            )
        # Shielded: half a sleep, with the door shut and memory held, would help nobody.
        task = asyncio.create_task(in_turn())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def _conflict(message: str) -> RequestError:
    return RequestError(message, status=409, code="engine_busy")
