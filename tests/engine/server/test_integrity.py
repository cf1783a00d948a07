"""GET /pdlaunch/integrity: what rank 0 proves of its books."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.protocol.engine import CheckIntegrity
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank


async def check(engine: Engine) -> tuple[int, dict]:
    async with engine.session.get(f"{engine.url}/pdlaunch/integrity") as response:
        return response.status, await response.json()


@pytest.mark.parametrize("error", [None, "a block is lost or has two kinds of owners"])
async def test_what_the_rank_says_is_passed_on(engine: Engine, rank: FakeRank, error: str | None):
    rank.integrity_error = error
    status, report = await check(engine)
    assert status == 200
    assert (report["ok"], report["error"]) == (error is None, error)
    assert (report["stats"]["num_blocks"], report["stats"]["num_free_blocks"]) == (64, 63)


async def test_a_rank_that_dies_meanwhile_is_503(engine: Engine, rank: FakeRank):
    rank.checks_integrity = False
    asking = asyncio.create_task(check(engine))
    await rank.wait_for(CheckIntegrity)
    await engine.service.use_link(None)
    status, body = await asking
    assert status == 503
    assert body["error"]["code"] == "engine_starting"
