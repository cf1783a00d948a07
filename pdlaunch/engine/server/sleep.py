"""Puts an engine to sleep: nothing new comes in, what runs ends, then rank 0 is told.

::

    awake ── sleep ──▶ draining ── idle, rank 0 says yes ──▶ asleep ── wake_up: all tags ──▶ awake
                          └── refused, or out of time ──▶ awake

A caller that goes away changes nothing: what it has asked for goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S
from pdlaunch.http.limits import Admission
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import Sleep, SleepReply, WakeUp

SLEEP_TAGS = ("weights", "kv_cache")


class SleepStatus(msgspec.Struct, frozen=True):
    """Answers calls of the sleep endpoints."""

    is_sleeping: bool
    sleeping_tags: list[str]
    num_bytes: int = 0  # device memory that the call gave back or took, over all ranks


def read_sleep_query(query: Mapping[str, str]) -> tuple[int, bool]:
    """Return the level of POST /sleep, and whether to wait for what runs. Raises RequestError."""
    _check_names(query, ("level", "mode"))
    level, mode = query.get("level", "1"), query.get("mode", "wait")
    if level not in ("1", "2"):
        raise RequestError(
            "level must be 1 (weights wait in host memory) or 2 (weights are loaded again)",
            param="level",
        )
    if mode not in ("wait", "refuse"):
        raise RequestError(
            "mode must be wait (for what runs) or refuse (while something runs)", param="mode"
        )
    return int(level), mode == "wait"


def read_tags(query: Any) -> list[str]:
    """Return the ``tags`` of POST /wake_up, repeated or with commas. Raises RequestError."""
    _check_names(query, ("tags",))
    tags = [tag for value in query.getall("tags", []) for tag in value.split(",")]
    if unknown := [tag for tag in tags if tag not in SLEEP_TAGS]:
        message = f"there is no pool {unknown[0]!r:.50}; tags are {' and '.join(SLEEP_TAGS)}"
        raise RequestError(message, param="tags")
    return list(dict.fromkeys(tags))


def _check_names(query: Mapping[str, str], known: tuple[str, ...]) -> None:
    if unknown := [name for name in query if name not in known]:
        message = f"unknown query parameter {unknown[0]!r:.50}; there are {', '.join(known)}"
        raise RequestError(message, param="query")


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

    def status(self, num_bytes: int = 0) -> SleepStatus:
        return SleepStatus(bool(self._tags), self._tags, num_bytes)

    def settle(self, tags: list[str], *, draining: bool = False) -> None:
        """Take over which pools sleep, also of a rank 0 that is not the one known so far."""
        self._tags = tags
        state = SleepState(state="draining" if draining else "sleeping" if tags else "awake")
        if state != self._state:
            self._state = state
            self.announce(state)

    async def fall_asleep(self, level: int, *, waits: bool) -> SleepStatus:
        """Put the engine to sleep.

        Raises RequestError: 400 without sleep mode, 409 while the engine is busy and the caller
        does not wait.
        """
        return await self._to_the_end(self._fall_asleep(level, waits))

    async def wake_up(self, tags: list[str]) -> SleepStatus:
        """Wake these pools up. Raises RequestError: 400 without sleep mode, 409 when it fails."""
        return await self._to_the_end(self._wake_up(tags))

    async def _fall_asleep(self, level: int, waits: bool) -> SleepStatus:
        if self._tags:
            return self.status()
        link = self._link()
        if not waits and self._admission.in_flight:
            raise _conflict(
                f"{self._admission.in_flight} requests are in flight; mode=wait waits for them"
            )
        timeout_s = self._timeout_s if waits else 0.0
        reply: SleepReply | None = None
        try:
            # The registry first keeps routers away; then what is here can come to its end.
            self.settle(self._tags, draining=True)
            if not await self._admission.wait_idle(self._timeout_s):
                raise _conflict(f"requests were still in flight after {self._timeout_s:g} s")
            reply = await link.call(
                lambda call_id: Sleep(call_id=call_id, level=level, timeout_s=timeout_s)
            )
        finally:
            self.settle(self._tags if reply is None else reply.sleeping_tags)
        return self._answer(reply)

    async def _wake_up(self, tags: list[str]) -> SleepStatus:
        if not self._tags:
            return self.status()
        reply = await self._link().call(lambda call_id: WakeUp(call_id=call_id, tags=tags))
        self.settle(reply.sleeping_tags)
        return self._answer(reply)

    def _answer(self, reply: SleepReply) -> SleepStatus:
        if reply.error is not None:
            raise _conflict(reply.error)
        return self.status(reply.num_bytes)

    async def _to_the_end(self, work: Coroutine[Any, Any, SleepStatus]) -> SleepStatus:
        async def in_turn() -> SleepStatus:
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
