"""Rank 0 is told whose a request is, and whether a rank may have died of it; requests that fail
there fail alone.
"""

from __future__ import annotations

import pytest

from pdlaunch.http.headers import ORIGIN_HEADER
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank

BODY = {"prompt": "hello", "max_tokens": 1, "n": 2}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({ORIGIN_HEADER: "77"}, (77, False)),
        ({ORIGIN_HEADER: "77;suspect"}, (77, True)),
        ({}, (0, False)),
    ],
)
async def test_all_choices_have_the_origin_of_their_prompt(
    engine: Engine, rank: FakeRank, headers, expected
):
    status, _, _ = await engine.post("/v1/completions", BODY, **headers)
    assert status == 200
    assert [(request.origin, request.is_suspect) for request in rank.added()] == [expected] * 2
