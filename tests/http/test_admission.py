"""Admission and deadlines: who is let in, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.admission import Admission
from pdlaunch.http.deadline import Deadlines


def leaving() -> OverloadedError:
    return OverloadedError("leaving", status=503, code="leaving")


async def test_a_request_grows_up_to_the_limit_and_gives_all_of_it_back() -> None:
    admission = Admission(3, leaving)
    with admission.admit() as ticket:
        ticket.grow(3, "n")
        with pytest.raises(OverloadedError, match="3 requests are in flight; at most 3") as full:
            admission.admit().__enter__()
        assert (full.value.status, full.value.code) == (429, "too_many_requests")
    assert admission.in_flight == 0


async def test_what_alone_exceeds_the_limit_is_the_callers_fault() -> None:
    admission = Admission(3, leaving)
    with pytest.raises(RequestError) as error, admission.admit(4, "prompt"):
        pass
    assert not isinstance(error.value, OverloadedError)
    assert (error.value.status, error.value.param) == (400, "prompt")
    assert admission.in_flight == 0


async def test_a_failed_growth_leaves_the_place_that_was_held() -> None:
    admission = Admission(2, leaving)
    with admission.admit(), admission.admit() as second:
        with pytest.raises(OverloadedError):
            second.grow(2, "n")
        assert admission.in_flight == 2
    assert admission.in_flight == 0


async def test_draining_refuses_newcomers_and_waits_for_the_others() -> None:
    admission = Admission(2, leaving)
    with admission.admit():
        assert not await admission.drain(0.0)
        draining = asyncio.ensure_future(admission.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="leaving"):
            admission.check_open()
        assert not draining.done()
    assert await draining


async def test_a_deadline_covers_all_parts_of_a_request() -> None:
    deadline = Deadlines(0.0, leaving, retry_after_s=7).start()
    for _ in range(2):
        with pytest.raises(OverloadedError, match="within 0 s") as error:
            async with deadline.guard():
                await asyncio.Event().wait()
        assert (error.value.status, error.value.retry_after_s) == (503, 7)
        assert error.value.code == "request_timeout"


async def test_closing_ends_what_runs_and_what_comes() -> None:
    deadlines = Deadlines(60.0, leaving)
    began = asyncio.Event()

    async def run() -> None:
        async with deadlines.start().guard():
            began.set()
            await asyncio.Event().wait()

    running = asyncio.ensure_future(run())
    await began.wait()
    deadlines.close()
    deadlines.close()
    with pytest.raises(OverloadedError, match="leaving"):
        await running
    with pytest.raises(OverloadedError, match="leaving"):
        await run()


async def test_errors_pass_a_guard_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        async with Deadlines(60.0, leaving).start().guard():
            raise ZeroDivisionError
