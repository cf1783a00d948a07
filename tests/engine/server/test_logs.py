"""What an engine's server writes into its log: one line for what is expected, a traceback for what
is not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pdlaunch.engine.server.generation import Generation
from pdlaunch.observe.metrics import RequestClock
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank
from tests.engine.server.test_completions import running_stream


async def test_an_error_that_nobody_expected_shows_its_traceback(
    engine: Engine,
    rank: FakeRank,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Generation.deltas

    async def deltas(self: Generation, clock: RequestClock) -> AsyncIterator[object]:
        async for some in told(self, clock):
            yield some
            raise ZeroDivisionError("made up")

    monkeypatch.setattr(Generation, "deltas", deltas)
    async with running_stream(engine, rank) as (_, response):
        assert "error" in await response.text()
    (record,) = [record for record in caplog.records if record.getMessage() == "request failed"]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
