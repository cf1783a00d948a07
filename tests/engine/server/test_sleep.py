"""POST /sleep, POST /wake_up, GET /is_sleeping in front of a scripted rank 0."""

import asyncio

import pytest

from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import AddRequest, RequestFinished, Sleep, SleepReply, WakeUp, Welcome
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent

ALL = ["kv_cache", "weights"]


async def call(engine: Engine, path: str) -> tuple[int, dict]:
    async with engine.session.post(engine.url + path) as response:
        return response.status, await response.json()


@pytest.fixture
async def sleeper(make_engine) -> Engine:
    engine = await make_engine(enable_sleep_mode=True, enable_cumem_allocator=True)
    engine.states = []
    engine.announced = asyncio.Queue()

    def announce(state: SleepState) -> None:
        engine.states.append(state.state)
        engine.announced.put_nowait(state.state)

    engine.service.sleep.announce = announce
    return engine


async def fall_asleep(engine: Engine, rank: FakeRank) -> None:
    task = asyncio.create_task(call(engine, "/sleep"))
    (message,) = await rank.wait_for(Sleep)
    await rank.send(SleepReply(call_id=message.call_id, sleeping_tags=ALL, num_bytes=7))
    assert await task == answer(ALL, 7)


def answer(tags: list[str], num_bytes: int = 0) -> tuple[int, dict]:
    return 200, {"is_sleeping": bool(tags), "sleeping_tags": tags, "num_bytes": num_bytes}


async def test_sleep_and_wake(sleeper: Engine, rank: FakeRank) -> None:
    assert await sleeper.get("/is_sleeping") == answer([])
    await fall_asleep(sleeper, rank)
    assert await sleeper.get("/is_sleeping") == answer(ALL)
    assert await call(sleeper, "/sleep") == answer(ALL)
    status, error = await sleeper.refusal()
    assert (status, error["code"]) == (503, "engine_sleeping")
    assert (await sleeper.get("/health"))[0] == 503
    for number, (tag, left) in enumerate((("weights", ["kv_cache"]), ("kv_cache", [])), 1):
        task = asyncio.create_task(call(sleeper, f"/wake_up?tags={tag}"))
        message = (await rank.wait_for(WakeUp, number))[-1]
        assert message.tags == [tag]
        await rank.send(SleepReply(call_id=message.call_id, sleeping_tags=left, num_bytes=3))
        assert await task == answer(left, 3)
    assert (await sleeper.complete())["choices"]
    assert sleeper.states == ["draining", "sleeping", "awake"]


async def test_without_sleep_mode_the_reason_is_given(engine: Engine) -> None:
    for path in ("/sleep?level=1", "/wake_up"):
        status, answer = await call(engine, path)
        assert status == 400
        assert "enable_sleep_mode is off" in answer["error"]["message"]
    assert (await engine.get("/is_sleeping"))[0] == 200


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=3", "level"),
        ("/sleep?level=x", "level"),
        ("/sleep?mode=now", "mode"),
        ("/sleep?tags=weights", "query"),
        ("/wake_up?tags=weights,activations", "tags"),
        ("/wake_up?level=1", "query"),
    ],
)
async def test_wrong_queries_are_named(path: str, param: str, sleeper: Engine) -> None:
    status, answer = await call(sleeper, path)
    assert (status, answer["error"]["param"]) == (400, param)
    assert sleeper.states == []


async def test_mode_refuse_refuses_and_mode_wait_waits_for_running_requests(
    sleeper: Engine, rank: FakeRank
) -> None:
    rank.script = silent
    running = asyncio.create_task(
        sleeper.post("/v1/completions", {"prompt": "hello", "max_tokens": 1})
    )
    (request,) = await rank.wait_for(AddRequest)
    status, answer = await call(sleeper, "/sleep?mode=refuse")
    assert (status, answer["error"]["code"]) == (409, "engine_busy")
    assert "1 requests are in flight" in answer["error"]["message"]
    task = asyncio.create_task(call(sleeper, "/sleep?level=2"))
    while await sleeper.announced.get() != "draining":
        pass
    assert not [message for message in rank.received if isinstance(message, Sleep)]
    status, error = await sleeper.refusal()
    assert (status, error["code"]) == (503, "engine_sleeping")
    await rank.say(
        RequestFinished(
            request_id=request.request_id, reason="length", tokens=[rank.output(100, request)]
        )
    )
    assert (await running)[0] == 200
    (message,) = await rank.wait_for(Sleep)
    assert (message.level, message.timeout_s > 0) == (2, True)
    await rank.send(SleepReply(call_id=message.call_id, sleeping_tags=ALL))
    assert (await task)[0] == 200


async def test_a_lost_rank_ends_the_call_and_a_new_one_is_awake(
    sleeper: Engine, rank: FakeRank
) -> None:
    await fall_asleep(sleeper, rank)
    task = asyncio.create_task(call(sleeper, "/wake_up"))
    await rank.wait_for(WakeUp)
    await sleeper.service.use_link(None)
    assert (await task)[0] == 503
    assert sleeper.service.sleep.status()["is_sleeping"]
    sleeper.service.receive(Welcome(num_blocks=64, max_model_len=64))
    assert not sleeper.service.sleep.status()["is_sleeping"]
    assert sleeper.states == ["draining", "sleeping", "awake"]


async def test_a_new_server_learns_that_its_engine_sleeps(sleeper: Engine, rank: FakeRank) -> None:
    sleeper.service.receive(Welcome(num_blocks=64, max_model_len=64, sleeping_tags=["kv_cache"]))
    assert sleeper.service.sleep.status()["sleeping_tags"] == ["kv_cache"]
    assert sleeper.states == ["sleeping"]
    assert (await sleeper.refusal())[0] == 503
    # What the earlier server has asked for comes true.
    await rank.send(SleepReply(call_id=99, sleeping_tags=[]))
    while await sleeper.announced.get() != "awake":
        pass
    await sleeper.complete()


async def test_a_drain_does_not_wait_for_the_leases_of_a_dead_rank(engine: Engine) -> None:
    engine.service.metrics.stats.num_leased_requests = 1
    await engine.service.use_link(None)
    async with asyncio.timeout(60):
        await engine.service.drain(3600)
