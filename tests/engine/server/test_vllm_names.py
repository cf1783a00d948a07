"""Metrics of engines are named, typed, labelled and divided into buckets as vLLM's.

vllm_metrics.json lists those of one version of vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from pdlaunch.engine.server.metrics import ServerMetrics

VLLM = json.loads((Path(__file__).parent / "vllm_metrics.json").read_text())
ABSENT = {
    "admission_rejections": "refusals are in request_errors_total, by status",
    "engine_sleep_state": "pdlaunch_router_engines{state='sleeping'} tells",
    "num_requests_kv_fetch_by_stage": "num_requests_waiting_by_reason{reason='deferred'} tells",
    "mm_cache_queries": "no model with images is served",
    "mm_cache_hits": "no model with images is served",
    "lora_requests_info": "no adapters are served",
    "corrupted_requests": "such requests end with an error",
    "watermark_requests": "there are no watermarks",
    "kv_block_lifetime_seconds": "blocks are not sampled",
    "kv_block_idle_before_evict_seconds": "blocks are not sampled",
    "kv_block_reuse_gap_seconds": "blocks are not sampled",
}


def families() -> dict[str, Metric]:
    registry = CollectorRegistry()
    ServerMetrics(registry, engine="decode-0", role="decode", model_name="m")
    return {family.name.removeprefix("pdlaunch_"): family for family in registry.collect()}


def test_every_metric_of_vllm_is_there_or_has_a_reason_not_to_be() -> None:
    ours = families()
    assert ABSENT.keys() == VLLM["metrics"].keys() - ours.keys()


def test_those_that_are_there_have_its_types_and_labels() -> None:
    ours = families()
    for name in VLLM["metrics"].keys() - ABSENT.keys():
        wanted, found = VLLM["metrics"][name], ours[name]
        assert found.type == wanted["type"], name
        for sample in found.samples:
            assert sample.labels.keys() >= set(wanted["labels"]), name


def test_its_buckets_are_among_ours() -> None:
    """So quantiles over engines of both kinds can be computed."""
    for name, wanted in VLLM["metrics"].items():
        if wanted["type"] != "histogram" or name in ABSENT:
            continue
        found = {
            float(sample.labels["le"])
            for sample in families()[name].samples
            if sample.name.endswith("_bucket")
        }
        assert found >= set(VLLM["buckets"][wanted["buckets"]]), name
