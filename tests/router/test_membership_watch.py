"""Engines that run already, behind a router that watches them: in one process, over sockets."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.http.watch import canary
from tests.launch.sidecar.fake_vllm import FakeVllm, answer_of
from tests.router.alone_router import PROMPT, Alone, alone

__all__ = ["alone"]


@pytest.fixture(autouse=True)
def _canaries_follow_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "FIRST_RETRY_S", 0.02)


async def test_a_pair_serves_when_its_canary_has_come_through(alone: Alone) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, moves_bytes=name != "decode-0")
        alone.add(name)
    await alone.until(lambda: alone.outcomes("failed"))
    assert not alone.pool.serving
    assert (await alone.complete())[0] == 503
    await alone.until(lambda: "computed the prompt itself" in alone.reason("decode-0"))

    alone.engines["decode-0"].moves_bytes = True
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    assert alone.outcomes("proven") == 1
    num_bytes = alone.engines["decode-0"].num_bytes
    assert (await alone.complete())[0] == 200
    assert alone.engines["decode-0"].num_bytes > num_bytes


async def test_an_engine_that_dies_is_left_and_proven_again_when_it_is_back(alone: Alone) -> None:
    await alone.pair()
    before = alone.engine("decode-0")
    await alone.stop("decode-0")
    await alone.until(lambda: alone.engine("decode-0").state == "stalled")
    # It may have died between the questions of one look, of which /health is the first.
    await alone.until(lambda: "/health does not answer" in alone.reason("decode-0"))
    # Those that are left answer alone.
    status, answer = await alone.complete()
    assert status == 200
    assert answer["choices"][0]["text"] == "".join(f"<{each}>" for each in answer_of(PROMPT, 4))

    engine = await alone.start("decode-0", moves_bytes=False)
    await alone.until(lambda: alone.outcomes("failed"))
    assert "decode-0" not in alone.ready
    engine.moves_bytes = True
    await alone.until(lambda: "decode-0" in alone.ready)
    assert alone.engine("decode-0").processes[0] == before.processes[0] + 1
    assert alone.outcomes("proven") == 2


async def test_a_pair_that_has_failed_requests_is_proven_again(alone: Alone) -> None:
    await alone.pair()
    alone.engines["decode-0"].moves_bytes = False
    alone.pool.failed(alone.engine("decode-0"))
    await alone.until(lambda: "decode-0" not in alone.ready)
    alone.engines["decode-0"].moves_bytes = True
    await alone.until(lambda: "decode-0" in alone.ready)


async def untold_pair(alone: Alone) -> tuple[FakeVllm, FakeVllm]:
    """Start a pair of which decode does not tell what it has computed."""
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, tells_cached=False, tokens_by_source={})
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    engines = alone.engines["prefill-0"], alone.engines["decode-0"]
    looks = engines[1].num_looks
    await alone.until(lambda: engines[1].num_looks > looks + 1)
    return engines


async def test_a_pair_that_nobody_can_check_is_shown(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    """A vLLM that neither tells nor counts it."""
    _, decode = await untold_pair(alone)
    assert [pair.path for pair in alone.state.pool.pairs] == ["canary, unchecked"]
    said = [each for each in caplog.messages if "--enable-prompt-tokens-details" in each]
    assert len(said) == 1
    # Failed READs are counted by every version.
    num_proven = alone.outcomes("proven")
    decode.num_failed_reads += 1
    await alone.until(lambda: alone.outcomes("proven") > num_proven)
    said = [each for each in caplog.messages if "--enable-prompt-tokens-details" in each]
    assert len(said) == 1


async def test_an_engine_sleeps_when_nothing_runs_or_is_leased_and_is_proven_again(
    alone: Alone,
) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, is_sleeping=False)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    prefill, decode = alone.engines["prefill-0"], alone.engines["decode-0"]

    prefill.lends = 0.25
    status, answer = await alone.command("POST", "/sleep?engine=prefill-0&mode=refuse")
    assert (status, answer["error"]["code"]) == (409, "engine_busy")
    assert alone.ready == {"prefill-0", "decode-0"}

    falling = asyncio.ensure_future(alone.command("POST", "/sleep?engine=prefill-0&level=2"))
    await alone.until(lambda: alone.engine("prefill-0").state == "draining")
    assert (await alone.complete())[0] == 200
    assert not prefill.is_sleeping, "its blocks are still leased"
    prefill.lends = 0.0
    status, answer = await falling
    assert (status, answer["engines"]) == (
        200,
        [{"engine": "prefill-0", "is_sleeping": True, "num_bytes": 0}],
    )
    assert alone.engine("prefill-0").state == "sleeping"
    num_bytes = decode.num_bytes
    assert (await alone.complete())[0] == 200
    assert decode.num_bytes == num_bytes, "decode serves alone"

    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0&tags=weights")
    assert answer["engines"][0]["is_sleeping"] is True
    assert alone.ready == {"decode-0"}
    num_proven = alone.outcomes("proven")
    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0")
    assert answer["engines"][0]["is_sleeping"] is False
    await alone.until(lambda: alone.outcomes("proven") > num_proven)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"} and alone.pool.pairs)
    num_bytes = decode.num_bytes
    assert (await alone.complete())[0] == 200
    assert decode.num_bytes > num_bytes
