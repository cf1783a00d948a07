"""One call for all who ask for the same while it runs."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pdlaunch.http.shared_calls import SharedCalls
from tests.router.fake_engine import until


async def test_callers_share_a_call_while_it_runs_and_no_longer() -> None:
    keys: list[str] = []
    may_end = asyncio.Event()

    async def make(key: str) -> str:
        keys.append(key)
        await may_end.wait()
        return key.upper()

    calls = SharedCalls(make)
    waiting = [asyncio.create_task(calls(key)) for key in ("a", "b", "a", "a")]
    await asyncio.sleep(0)
    waiting[0].cancel()  # the one that began it
    await asyncio.sleep(0)
    may_end.set()
    assert await asyncio.gather(*waiting[1:]) == ["B", "A", "A"]
    assert keys == ["a", "b"]
    assert await calls("a") == "A"
    assert keys == ["a", "b", "a"]


async def test_an_error_reaches_all_and_nobody_after_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    results: list[Exception | str] = [OSError("no such name"), OSError("nobody hears this"), "ok"]

    async def make(_key: str) -> str:
        await asyncio.sleep(0)
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    calls = SharedCalls(make)
    found = await asyncio.gather(calls("a"), calls("a"), return_exceptions=True)
    assert [str(error) for error in found] == ["no such name"] * 2
    gone = asyncio.create_task(calls("a"))
    await asyncio.sleep(0)
    gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone
    await until(lambda: not calls._running)
    assert await calls("a") == "ok"
    assert not caplog.records
