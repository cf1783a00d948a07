from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.observe.metrics import RequestMetrics, render_metrics


def samples(registry: CollectorRegistry) -> dict[str, float]:
    text = render_metrics(registry).decode()

    def label(labels: dict[str, str]) -> str:
        return labels.get("finished_reason") or labels.get("status") or ""

    return {
        f"{sample.name}/{label(sample.labels)}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_requests_are_counted_by_reason_and_status():
    registry = CollectorRegistry()
    metrics = RequestMetrics(
        registry, {"engine": "prefill-0", "role": "prefill", "model_name": "m"}
    )
    metrics.finished("stop")
    metrics.finished("stop")
    metrics.failed(429)
    metrics.time_to_first_token.observe(0.3)
    found = samples(registry)
    assert found["pdlaunch_request_success_total/stop"] == 2
    assert found["pdlaunch_request_errors_total/429"] == 1
    assert found["pdlaunch_time_to_first_token_seconds_count/"] == 1


@pytest.mark.parametrize("status", [400, 408, 413, 499, 502, 503])
def test_errors_are_there_before_the_first_one(status: int) -> None:
    """``increase`` of a series that begins with 1 is 0."""
    registry = CollectorRegistry()
    RequestMetrics(registry, {"model_name": "m"})
    assert samples(registry)[f"pdlaunch_request_errors_total/{status}"] == 0
