from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.engine.histograms import Histograms
from pdlaunch.protocol.engine import EngineStats, RequestFinished
from pdlaunch.protocol.transfer import PullFinished
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank

LABELS = {"engine": "prefill-0", "role": "prefill", "model_name": "tiny"}


async def scrape(engine: Engine) -> dict[str, float]:
    """Samples by name, and by name and the labels beside the common ones."""
    async with engine.session.get(engine.url + "/metrics") as response:
        text = await response.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.items() >= LABELS.items()
            extra = [sample.labels[name] for name in sample.labels if name not in LABELS]
            found["/".join([sample.name, *extra])] = sample.value
    return found


async def test_requests_tokens_and_times_are_counted(engine: Engine, rank: FakeRank):
    rank.script = rank.says(rank.ids("hello world") + rank.ids(END_TOKEN), ends=True)
    await engine.complete(prompt=[5, 6, 7])
    await engine.stream(prompt=[5, 6, 7], max_tokens=2)
    await engine.refusal(n=0)
    found = await scrape(engine)
    num_tokens = len(rank.ids("hello world")) + 1
    assert found["pdlaunch_request_success_total/stop"] == 1
    assert found["pdlaunch_request_success_total/length"] == 1
    assert found["pdlaunch_request_errors_total/400"] == 1
    assert found["pdlaunch_prompt_tokens_total"] == 6
    assert found["pdlaunch_generation_tokens_total"] == num_tokens + 2
    assert found["pdlaunch_time_to_first_token_seconds_count"] == 2
    assert found["pdlaunch_e2e_request_latency_seconds_count"] == 2
    assert found["pdlaunch_http_requests_in_flight"] == 1, "the scrape itself"


async def test_the_rank_s_totals_are_shown(engine: Engine, rank: FakeRank):
    assert (await scrape(engine))["pdlaunch_kv_cache_usage_perc"] == 0
    await rank.stats(
        num_running=2,
        num_blocks=64,
        num_free_blocks=16,
        transfer_bytes=1000,
        transfers=3,
        preemptions=1,
    )
    await engine.complete(max_tokens=1)
    found = await scrape(engine)
    assert found["pdlaunch_num_requests_running"] == 2
    assert found["pdlaunch_kv_cache_usage_perc"] == 0.75
    assert found["pdlaunch_kv_transfer_bytes_total"] == 1000
    assert found["pdlaunch_kv_transfers_total"] == 3
    assert found["pdlaunch_num_preemptions_total"] == 1


async def test_a_scrape_asks_the_rank_for_totals_that_it_has_not_sent(
    engine: Engine, rank: FakeRank
) -> None:
    await engine.complete(max_tokens=1)
    rank.totals = EngineStats(num_blocks=64, num_free_blocks=16, transfers=5)
    for transfers in (5, 6):
        assert (await scrape(engine))["pdlaunch_kv_transfers_total"] == transfers
        rank.totals.transfers += 1


async def test_a_rank_that_does_not_answer_keeps_no_scrape_waiting(
    engine: Engine, rank: FakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdlaunch.engine.server.engine_service.READ_STATS_TIMEOUT_S", 0.05)
    await rank.stats(transfers=3)
    await engine.complete(max_tokens=1)
    rank.answers_stats = False
    assert (await scrape(engine))["pdlaunch_kv_transfers_total"] == 3
    await engine.service.use_link(None)
    assert (await scrape(engine))["pdlaunch_kv_transfers_total"] == 3


async def test_reasons_and_parameters_of_requests_are_counted(
    engine: Engine, rank: FakeRank
) -> None:
    await engine.complete(prompt=[5, 6, 7], max_tokens=3, n=2)
    rank.script = lambda request: [
        RequestFinished(request_id=request.request_id, reason="error", error="it broke")
    ]
    await engine.refusal(prompt=[5, 6, 7], max_tokens=3)
    found = await scrape(engine)
    reasons = {
        reason: found[f"pdlaunch_request_success_total/{reason}"]
        for reason in ("stop", "length", "abort", "error")
    }
    assert reasons == {"stop": 0, "length": 2, "abort": 0, "error": 1}
    assert found["pdlaunch_request_params_n_sum"] == 3
    assert found["pdlaunch_request_params_max_tokens_count"] == 3
    assert found["pdlaunch_request_params_max_tokens_sum"] == 9
    assert found["pdlaunch_request_max_num_generation_tokens_sum"] == 3


async def test_the_rank_s_histograms_are_shown(engine: Engine, rank: FakeRank) -> None:
    histograms = Histograms()
    for num_tokens in (7, 9):
        histograms.observe("iteration_tokens_total", num_tokens)
    for num_bytes in (4096, 8192):
        histograms.pulled(
            PullFinished(
                pull_id="p",
                ok=True,
                num_bytes=num_bytes,
                seconds=0.004,
                read_s=0.002,
                prefill="prefill-7",
                path="p2p/memfd",
            )
        )
    await rank.stats(num_blocks=64, histograms=histograms.shown())
    await engine.complete(max_tokens=1)
    found = await scrape(engine)
    steps = "pdlaunch_iteration_tokens_total"
    assert [found[f"{steps}_bucket/{le}"] for le in ("1.0", "8.0", "16.0", "+Inf")] == [0, 1, 2, 2]
    assert found[f"{steps}_sum"] == 16
    pair = "prefill-0/p2p/memfd/prefill-7"
    assert found[f"pdlaunch_kv_pull_bytes_sum/{pair}"] == 12288
    assert found[f"pdlaunch_kv_pull_seconds_count/{pair}"] == 2
    assert found[f"pdlaunch_kv_pull_bytes_per_second_sum/{pair}"] == 6_144_000
    assert found["pdlaunch_request_queue_time_seconds_count"] == 0


async def test_no_series_tells_when_another_was_created(engine: Engine) -> None:
    assert not [name for name in await scrape(engine) if "_created" in name]
