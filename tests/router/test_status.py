"""What /pdlaunch/status says of a deployment of fake engines."""

from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pdlaunch import __version__
from pdlaunch.engine.server.engine_service import ServerMetrics
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.protocol.control import Entry, Registry
from pdlaunch.protocol.status import DeploymentStatus
from pdlaunch.router import deployment_view
from pdlaunch.router.deployment_view import NAMES, EngineHistory, RateHistory, scan
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from tests.clock import FakeClock
from tests.router.conftest import Stand, pair, proof

PULLS = """\
# TYPE pdlaunch_kv_transfer_bytes counter
pdlaunch_kv_transfer_bytes_total{engine="decode-0"} %d
pdlaunch_kv_transfers_total{engine="decode-0"} %d
pdlaunch_kv_transfer_seconds_total{engine="decode-0"} %f
pdlaunch_num_requests_running{engine="decode-0"} 3
pdlaunch_num_requests_waiting{engine="decode-0"} 2
pdlaunch_kv_cache_usage_perc{engine="decode-0"} 0.25
"""


@pytest.fixture(autouse=True)
def _engines_have_time_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_view, "READ_WAIT_S", 60.0)


async def get(stand: Stand) -> dict[str, Any]:
    return await stand.get("/pdlaunch/status")


async def test_it_says_everything_of_engines_and_pairs(stand: Stand) -> None:
    engines = pair()
    engines[1].metrics_page = PULLS % (4_000_000_000, 2, 0.5)
    stand.pairs = [
        proof("prefill-0/rank-0", f"decode-0/rank-{rank}", gigabytes_per_s=speed, slow=slow)
        for rank, (speed, slow) in enumerate(((9.0, ""), (8.5, "PD504 too slow")))
    ]
    await stand.start(engines)
    await stand.post({"prompt": "x", "max_tokens": 4})
    raw = await get(stand)
    status = msgspec.convert(raw, DeploymentStatus)
    assert (status.version, status.model, status.state) == (__version__, "tiny", "ok")
    assert [(engine.name, engine.role, engine.state) for engine in status.engines] == [
        ("decode-0", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
    ]
    assert [(one.kind, one.share) for one in status.routes] == [("pair", 1.0)]
    decode = status.engines[0]
    assert decode.host == "127.0.0.1"
    assert (decode.reading.running, decode.reading.waiting) == (3, 2)
    assert (decode.reading.kv_usage, decode.reading.host_usage) == (0.25, None)
    # One pair for two ranks, whose slower link counts; its only peer's bytes are all bytes.
    (link,) = status.pairs
    assert (link.prefill, link.decode, link.path) == ("prefill-0", "decode-0", "p2p/memfd")
    assert (link.gigabytes_per_s, link.slow) == (8.5, "PD504 too slow")
    assert (link.pulls.number, link.pulls.num_bytes) == (2, 4_000_000_000)
    assert (status.requests, status.errors, status.in_flight) == (1, 0, 0)


async def test_deaths_and_returns_are_events(stand: Stand) -> None:
    await stand.start_pair()
    assert (await get(stand))["events"] == []
    stand.state.pair_failures["prefill-0", "decode-0"] = "broken"
    stand.publish({"decode-0": None})
    status = await get(stand)
    assert [(gone["name"], gone["role"]) for gone in status["gone"]] == [("decode-0", "decode")]
    stand.publish({"decode-0": "starting"})
    stand.publish()
    status = await get(stand)
    assert status["gone"] == []
    assert [(event["text"], event["is_bad"]) for event in status["events"]] == [
        ("gone (was ready)", True),
        ("starting (new)", True),
        ("ready (was starting)", False),
    ]
    assert stand.state.pair_failures
    for state in ("draining", "starting"):
        stand.publish({"decode-0": state})
        stand.publish({"decode-0": None})
        assert (await get(stand))["gone"] == []
        assert stand.state.pair_failures == {}


async def test_of_many_engines_those_are_read_that_were_not_for_longest(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_view, "MAX_READS", 1)
    monkeypatch.setattr(deployment_view, "FRESH_S", 0.0)
    await stand.start_pair()
    stand.publish({"prefill-0": "starting", "decode-0": "starting"})  # they may answer canaries
    assert not any(each["reading"] for each in (await get(stand))["engines"])
    stand.publish()
    status = [(await get(stand))["engines"] for _ in range(2)]
    assert [sum(each["reading"] is not None for each in engines) for engines in status] == [1, 2]


def test_rates_errors_and_times_of_each_step() -> None:
    clock, metrics = FakeClock(), RouterMetrics("m")
    history = RateHistory(metrics, lambda: clock.now + 1e9, EnginePool(clock))
    request = RequestClock(metrics.requests, clock)
    clock.now += 0.5
    request.tokens(0, 1)
    clock.now += 1.5
    request.tokens(0, 3)
    metrics.requests.finished("stop")
    metrics.requests.failed(503)
    metrics.requests.failed(499)  # its client left
    history.take()
    clock.now += 2.0
    history.take()
    busy, idle = history.points
    assert (busy.requests_per_s, busy.errors_per_s, busy.output_tokens_per_s) == (0.5, 0.5, 2.0)
    assert busy.at == clock.now - 2.0 + 1e9
    assert 250 < busy.first_token_ms.p50 <= 500
    assert 300 < busy.inter_token_ms.p95 <= 500
    assert (idle.requests_per_s, idle.first_token_ms) == (0.0, None)
    # Three tokens came together after 1.5 s.
    assert (busy.mean_inter_token_ms, busy.streams) == (500.0, 0.25)
    assert history.now().requests_per_s == 0.25


def test_the_fastest_tokens_are_those_of_few_streams() -> None:
    clock, metrics = FakeClock(), RouterMetrics("m")
    history = RateHistory(metrics, lambda: clock.now, EnginePool(clock))

    def take(token_ms: float, num_streams: int) -> float | None:
        """Let streams run for two seconds; return what the fastest of all tokens took."""
        for _ in range(int(2_000 / token_ms)):
            for _ in range(num_streams):
                metrics.requests.sent(1, token_ms / 1e3)
        clock.now += 2.0
        history.take()
        best = history.fastest
        return None if best is None else best.mean_inter_token_ms

    assert take(500, 2) is None  # eight tokens say nothing
    assert take(20, 8) == pytest.approx(20)
    assert take(40, 16) == pytest.approx(20)
    assert take(21, 1) == pytest.approx(21)  # as fast as that, but alone
    assert take(20, 8) == pytest.approx(21)
    assert take(10, 8) == pytest.approx(10)


def test_the_time_in_which_an_engine_computes_prompts() -> None:
    clock = FakeClock()
    pool = EnginePool(clock)
    entry = Entry(name="prefill-0", kind="server", engine="prefill-0", incarnation=1, state="ready")
    pool.update(Registry(version=1, entries=[entry]))
    history = RateHistory(RouterMetrics("m"), clock, pool)
    (engine,) = pool.engines
    clock.now += 1.0
    for outcome in ("a token", "a failure"):
        with engine.working(clock, num_prompt_tokens=10, num_uncached=10) as begin:
            clock.now += 1.0
            assert history.computing(engine) == pytest.approx(
                {"a token": 1 / 2, "a failure": 2 / 4}[outcome]
            )
            if outcome == "a token":
                begin()
        clock.now += 1.0
    assert history.computing(engine) == pytest.approx(2 / 5)


def test_every_word_is_on_the_page_of_a_native_engine() -> None:
    """A metric that gets another name would else be missing without a word."""
    metrics = ServerMetrics(CollectorRegistry(), engine="e", role="decode", model_name="m")
    found = scan(generate_latest(metrics.registry).decode())
    assert set(found) == set(NAMES.values())


def test_labels_are_summed_and_the_fullest_cache_counts() -> None:
    found = scan(
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0"} 2.0\n'
        'vllm:num_requests_running{engine="1"} 3.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:kv_cache_usage_perc{engine="1"} 0.25\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="p",prefill="prefill-0"} 10\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="q",prefill="prefill-0"} 5\n'
        'pdlaunch_kv_pull_bytes_sum{decode="d",path="p",prefill="prefill-1"} 7\n'
        'vllm:prompt_tokens_total{engine="0"} NaN\n'
        "vllm:prompt_tokens_total -1\n"
        "vllm:prompt_tokens_total many\n"
        "nonsense\n"
        "\n"
    )
    assert found == {
        "running": 5.0,
        "kv_usage": 0.5,
        "pulled_bytes@prefill-0": 15.0,
        "pulled_bytes@prefill-1": 7.0,
    }


def test_rates_and_shares_are_of_the_last_seconds() -> None:
    book = EngineHistory((1,))
    first = {"prompt_tokens": 100.0, "device_hits": 100.0, "pulled_bytes": 0.0}
    book.add(0.0, first)
    assert book.reading(200.0) is not None
    book.add(50.0, first)
    later = {"prompt_tokens": 300.0, "device_hits": 150.0, "pulled_bytes": 8e9}
    later |= {"pull_seconds": 2.0, "pulls": 8.0}
    book.add(55.0, later)
    shown = book.reading(200.0)
    assert (shown.pulls.bytes_per_s, shown.pulls.gigabytes_per_s) == (1.6e9, 4.0)
    assert (shown.age_s, shown.pulls.mean_s) == (145.0, 0.25)
    assert (shown.cache["device"], shown.cache["remote"]) == (0.25, 0.0)
    # Later there were no prompts; whoever looks seldom sees what was since the last look.
    book.add(120.0, later)
    shown = book.reading(200.0)
    assert (shown.cache, shown.pulls.bytes_per_s) == (None, 0.0)
    book.add(180.0, later | {"pulled_bytes": 14e9})
    shown = book.reading(200.0)
    assert shown.pulls.bytes_per_s == 1e8
    # Its ranks were restarted: they count from zero.
    book.add(181.0, {"pulled_bytes": 1.0})
    assert book.pulls().bytes_per_s == 0.0
