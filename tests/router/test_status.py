"""What /pdlaunch/status and its stream say of a deployment of fake engines."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pdlaunch import __version__
from pdlaunch.protocol.control import PairReady, Registry
from pdlaunch.protocol.status import DeploymentStatus
from pdlaunch.router import deployment_view
from pdlaunch.router.deployment_view import MAX_WATCHERS
from tests.router.conftest import Stand, pair
from tests.router.fake_engine import FakeEngine, until

PULLS = """\
# TYPE pdlaunch_kv_transfer_bytes counter
pdlaunch_kv_transfer_bytes_total{engine="decode-0"} %d
pdlaunch_kv_transfers_total{engine="decode-0"} %d
pdlaunch_kv_transfer_seconds_total{engine="decode-0"} %f
pdlaunch_num_requests_running{engine="decode-0"} 3
pdlaunch_num_requests_waiting{engine="decode-0"} 2
pdlaunch_kv_cache_usage_perc{engine="decode-0"} 0.25
pdlaunch_kv_verification_failures_total{engine="decode-0"} %d
"""


@pytest.fixture(autouse=True)
def _engines_have_time_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_view, "READ_WAIT_S", 60.0)


async def get(stand: Stand, path: str = "/pdlaunch/status") -> dict[str, Any]:
    async with stand.session.get(path) as response:
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


def proven(rank: int, speed: float) -> PairReady:
    return PairReady(
        local=f"decode-0/rank-{rank}",
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path="p2p/memfd",
        gigabytes_per_s=speed,
        other_paths={"nixl/UCX": "3.5 GB/s"},
    )


async def test_it_says_everything_of_engines_and_pairs(stand: Stand) -> None:
    engines = pair()
    engines[1].metrics_page = PULLS % (4_000_000_000, 2, 0.5, 0)
    stand.pairs = [proven(0, 9.0), proven(1, 8.5)]
    await stand.start(engines)
    await stand.post({"prompt": "x", "max_tokens": 4})
    raw = await get(stand)
    status = msgspec.convert(raw, DeploymentStatus)
    assert (status.version, status.model, status.state) == (__version__, "tiny", "ok")
    assert [(engine.name, engine.role, engine.state) for engine in status.engines] == [
        ("decode-0", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
    ]
    decode = status.engines[0]
    assert decode.host == "127.0.0.1"
    assert decode.reading is not None
    assert (decode.reading.running, decode.reading.waiting) == (3, 2)
    assert (decode.reading.kv_usage, decode.reading.host_usage) == (0.25, None)
    # One pair for two ranks, whose slower link counts; its only peer's bytes are all bytes.
    (link,) = status.pairs
    assert (link.prefill, link.decode, link.path) == ("prefill-0", "decode-0", "p2p/memfd")
    assert (link.gigabytes_per_s, link.pulls, link.num_bytes) == (8.5, 2, 4_000_000_000)
    assert link.other_paths == {"nixl/UCX": "3.5 GB/s"}
    assert (status.requests, status.errors, status.in_flight) == (1, 0, 0)


async def test_refused_pulls_deaths_and_returns_are_events(stand: Stand) -> None:
    engines = pair()
    engines[1].metrics_page = PULLS % (0, 0, 0, 1)
    stand.pairs = [proven(0, 9.0)]
    await stand.start(engines)
    assert (await get(stand))["events"] == []
    engines[1].metrics_page = PULLS % (0, 0, 0, 3)
    stand.router.view._readings._histories["decode-0"].asked_at = float("-inf")
    (refused,) = (await get(stand))["events"]
    assert (refused["kind"], refused["name"], refused["is_bad"]) == ("pull", "decode-0", True)
    assert refused["text"] == "2 pulls were refused: hashes or checksums differed"
    stand.publish(without=["decode-0"])
    status = await get(stand)
    assert [(gone["name"], gone["role"]) for gone in status["gone"]] == [("decode-0", "decode")]
    stand.publish(starting=["decode-0"])
    stand.publish()
    status = await get(stand)
    assert status["gone"] == []
    assert [(event["text"], event["is_bad"]) for event in status["events"][1:]] == [
        ("gone (was ready)", True),
        ("starting (is here)", True),
        ("ready (was starting)", False),
    ]


async def test_the_stream_tells_changes_and_counts_no_error_when_its_watcher_leaves(
    stand: Stand,
) -> None:
    await stand.start(pair())
    async with stand.session.get("/pdlaunch/stream") as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        first = json.loads(await response.content.readline())
        assert [engine["state"] for engine in first["engines"]] == ["ready", "ready"]
        stand.publish(starting=["prefill-0"])
        while True:
            line = json.loads(await response.content.readline())
            if line["engines"][1]["state"] == "starting":
                break
    await until(lambda: stand.router.view._num_watchers == 0)
    assert stand.metric("pdlaunch_router_request_errors_total") == 0


async def test_watchers_are_bounded_and_leave_with_the_router(stand: Stand) -> None:
    await stand.start(pair())
    watchers = [await stand.session.get("/pdlaunch/stream") for _ in range(MAX_WATCHERS)]
    async with stand.session.get("/pdlaunch/stream") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "too_many_watchers"
    watchers.pop().close()
    await until(lambda: stand.router.view._num_watchers < MAX_WATCHERS)
    async with stand.session.get("/pdlaunch/stream") as response:
        assert response.status == 200
    await stand.router.close()
    for watcher in watchers:
        lines = (await watcher.read()).splitlines()
        assert json.loads(lines[-1])["model"] == "tiny"


async def test_a_thousand_engines_are_read_in_turns(stand: Stand) -> None:
    """All of them are one server here."""
    number = 1000
    engine = FakeEngine("decode-0", "decode")
    await stand.start([engine])
    entries = engine.entries(ready=False)
    stand.version += 1
    many = [
        msgspec.structs.replace(
            entry,
            name=entry.name.replace("decode-0", f"decode-{index}"),
            engine=f"decode-{index}",
        )
        for index in range(number)
        for entry in entries
    ]
    stand.state.update(Registry(version=stand.version, entries=many, pairs=[]))
    await stand.state.settled()
    seen = set()
    for _ in range(2):
        await stand.router.view._readings.refresh(stand.pool.engines, 30.0)
        status = stand.router.view.status()
        assert len(status.engines) == number
        seen.add(sum(each.reading is not None for each in status.engines))
    assert seen == {64, 128}
