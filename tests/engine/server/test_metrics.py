"""What /metrics shows. Names, types, labels and buckets are vLLM's: vllm_metrics.json lists those
of one version.
"""

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.engine.lifecycle import Histograms
from pdlaunch.engine.server.engine_service import ServerMetrics
from pdlaunch.protocol.engine import EngineStats, RequestFinished
from pdlaunch.protocol.transfer import PullFinished
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank

LABELS = {"engine": "prefill-0", "role": "prefill", "model_name": "tiny"}
PROMPT = [5, 6, 7]


async def scrape(engine: Engine) -> dict[str, float]:
    """Samples by name, and by name and the labels beside the common ones; without the prefix."""
    async with engine.session.get(engine.url + "/metrics") as response:
        text = await response.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.items() >= LABELS.items()
            extra = [sample.labels[name] for name in sample.labels if name not in LABELS]
            name = "/".join([sample.name.removeprefix("pdlaunch_"), *extra])
            assert "_created" not in name, "Prometheus takes it for a series of its own"
            found[name] = sample.value
    return found


async def test_requests_tokens_times_and_parameters_are_counted(engine: Engine, rank: FakeRank):
    rank.script = rank.says(rank.ids("hello world") + rank.ids(END_TOKEN), ends=True)
    num_tokens = len(rank.ids("hello world")) + 1
    await engine.complete(prompt=PROMPT, max_tokens=16)
    await engine.stream(prompt=PROMPT, max_tokens=2, n=2)
    await engine.refusal(n=0)
    rank.script = lambda request: [
        RequestFinished(request_id=request.request_id, reason="error", error="it broke")
    ]
    status, error = await engine.refusal(prompt=PROMPT, max_tokens=3)
    assert (status, error["message"], error["code"]) == (500, "it broke", "engine_error")
    expected = {
        "request_success_total/stop": 1,
        "request_success_total/length": 2,
        "request_success_total/abort": 0,
        "request_success_total/error": 1,
        "request_errors_total/400": 1,
        "request_errors_total/500": 1,
        "prompt_tokens_total": 9,
        "generation_tokens_total": num_tokens + 4,
        "time_to_first_token_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "http_requests_in_flight": 1,  # the scrape itself
    }
    assert (await scrape(engine)).items() >= expected.items()


async def test_a_scrape_shows_the_ranks_totals_and_asks_for_new_ones(
    engine: Engine, rank: FakeRank, monkeypatch: pytest.MonkeyPatch
):
    assert (await scrape(engine))["kv_cache_usage_perc"] == 0
    rank.totals = EngineStats(
        num_running=2,
        num_blocks=64,
        num_free_blocks=16,
        counts={"kv_transfer_bytes": 1000, "num_preemptions": 1},
    )
    expected = {
        "num_requests_running": 2,
        "kv_cache_usage_perc": 0.75,
        "kv_transfer_bytes_total": 1000,
        "num_preemptions_total": 1,
    }
    assert (await scrape(engine)).items() >= expected.items()
    # A rank that does not answer, or is gone, keeps no scrape waiting.
    monkeypatch.setattr("pdlaunch.engine.server.engine_service.READ_STATS_TIMEOUT_S", 0.05)
    rank.answers_stats = False
    assert (await scrape(engine)).items() >= expected.items()
    await engine.service.use_link(None)
    assert (await scrape(engine)).items() >= expected.items()


async def test_the_ranks_histograms_are_shown(engine: Engine, rank: FakeRank) -> None:
    histograms = Histograms()
    for num_tokens in (7, 9):
        histograms.observe("iteration_tokens_total", num_tokens)
    for num_bytes in (4096, 8192):
        event = PullFinished(pull_id="p", ok=True, prefill="prefill-7", path="p2p/memfd")
        event.num_bytes, event.seconds, event.read_s = num_bytes, 0.004, 0.002
        histograms.pulled(event)
    rank.totals = EngineStats(num_blocks=64, histograms=histograms.shown())
    found = await scrape(engine)
    steps, pair = "iteration_tokens_total", "prefill-0/p2p/memfd/prefill-7"
    assert [found[f"{steps}_bucket/{le}"] for le in ("1.0", "8.0", "16.0", "+Inf")] == [0, 1, 2, 2]
    expected = {
        f"{steps}_sum": 16,
        f"kv_pull_bytes_sum/{pair}": 12288,
        f"kv_pull_seconds_count/{pair}": 2,
        f"kv_pull_bytes_per_second_sum/{pair}": 6_144_000,
        "request_queue_time_seconds_count": 0,
    }
    assert found.items() >= expected.items()


VLLM = json.loads((Path(__file__).parent / "vllm_metrics.json").read_text())
ABSENT = {
    "admission_rejections": "refusals are in request_errors_total, by status",
    "engine_sleep_state": "pdlaunch_router_engines{state='sleeping'} tells",
    "num_requests_kv_fetch_by_stage": "num_requests_waiting_by_reason{reason='deferred'} tells",
    "request_params_n": "the sampling of requests is not measured",
    "request_params_max_tokens": "the sampling of requests is not measured",
    "request_max_num_generation_tokens": "request_generation_tokens tells",
    "request_num_preemptions": "num_preemptions tells",
    "request_prefill_kv_computed_tokens": "prompt_tokens_by_source tells",
    "cache_config_info": "pdlaunch status and check-config tell",
    "mm_cache_queries": "no model with images is served",
    "mm_cache_hits": "no model with images is served",
    "lora_requests_info": "no adapters are served",
    "corrupted_requests": "such requests end with an error",
    "watermark_requests": "there are no watermarks",
    "kv_block_lifetime_seconds": "blocks are not sampled",
    "kv_block_idle_before_evict_seconds": "blocks are not sampled",
    "kv_block_reuse_gap_seconds": "blocks are not sampled",
}


def test_every_metric_of_vllm_is_there_with_its_type_labels_and_buckets() -> None:
    """So quantiles over engines of both kinds can be computed."""
    registry = CollectorRegistry()
    ServerMetrics(registry, engine="decode-0", role="decode", model_name="m")
    ours: dict[str, Metric] = {
        family.name.removeprefix("pdlaunch_"): family for family in registry.collect()
    }
    assert ABSENT.keys() == VLLM["metrics"].keys() - ours.keys()
    for name in VLLM["metrics"].keys() - ABSENT.keys():
        wanted, found = VLLM["metrics"][name], ours[name]
        assert found.type == wanted["type"], name
        for sample in found.samples:
            assert sample.labels.keys() >= set(wanted["labels"]), name
        if wanted["type"] == "histogram":
            buckets = [one for one in found.samples if one.name.endswith("_bucket")]
            bounds = {float(one.labels["le"]) for one in buckets}
            assert bounds >= set(VLLM["buckets"][wanted["buckets"]]), name
