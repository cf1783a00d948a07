"""A router in front of engines that fail or are slow, and are well again later."""

from __future__ import annotations

import msgspec

from pdlaunch.observe.spans import PULL, Span, SpanReport
from pdlaunch.router.engine import OPEN_S
from tests.router.conftest import Stand, pairs
from tests.router.fake_engine import FakeEngine
from tests.router.test_life_of_a_request import completion, expected_text


class Clock:
    """Stands still; the pool's clock from here on."""

    def __init__(self, stand: Stand) -> None:
        self.now_s = stand.pool.clock()
        stand.pool.clock = self

    def __call__(self) -> float:
        return self.now_s


def decodes(number: int) -> list[FakeEngine]:
    return [FakeEngine(f"decode-{index}", "decode") for index in range(number)]


async def status_of(stand: Stand, name: str) -> dict[str, object]:
    async with stand.session.get("/pdlaunch/status") as response:
        engines = (await response.json())["engines"]
    return next(engine for engine in engines if engine["name"] == name)


async def test_who_fails_gets_one_try_at_a_time_until_it_is_well(stand: Stand) -> None:
    engines = decodes(2)
    await stand.start(engines)
    clock, sick = Clock(stand), engines[1]
    sick.status = 500

    async def ask(number: int) -> None:
        for _ in range(number):
            answer = await stand.post(completion(stream=True))
            assert answer.texts() == {0: expected_text("hello", 6)}

    await ask(4)
    assert len(sick.seen) == 1
    assert (await status_of(stand, "decode-1"))["health"] == "open"
    left_out = (await status_of(stand, "decode-1"))["left_out"]
    assert str(left_out).startswith("open after 1 failures")
    # A try that fails is made up for by the other engine, and the next one comes later.
    clock.now_s += OPEN_S
    assert (await status_of(stand, "decode-1"))["health"] == "half_open"
    await ask(4)
    assert len(sick.seen) == 2
    clock.now_s += OPEN_S
    await ask(2)
    assert len(sick.seen) == 2
    sick.status = None
    clock.now_s += OPEN_S
    await ask(1)
    assert len(sick.seen) == 3
    assert (await status_of(stand, "decode-1"))["health"] == "closed"
    assert (await status_of(stand, "decode-1"))["left_out"] == ""


async def test_pulls_that_fail_leave_out_the_pair_and_no_engine(stand: Stand) -> None:
    """Decode computes the prompts itself, as engines do, and tells so in its spans."""
    engines = pairs(1)
    await stand.start(engines)
    clock, decode = Clock(stand), engines[1]
    span = Span(PULL, 0.0, 0.1, {"error": "no such peer"})
    decode.report = msgspec.to_builtins(SpanReport(elapsed_s=0.2, spans=[span]))
    for pulls in (1, 1, 1):
        assert (await stand.post(completion(stream=True))).status == 200
        asked = [seen for seen in decode.seen if "kv_transfer_params" in seen.body]
        assert len(asked) == pulls
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "open"}
    decode.report = None
    clock.now_s += OPEN_S
    assert (await stand.post(completion(stream=True))).status == 200
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "closed"}
