"""What a real Prometheus says of a deployment's metrics, of the shipped rules and dashboards."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.client import Api, Deployment
from tests.e2e.waiting import await_true
from tests.prometheus.conftest import GRAFANA, Prometheus

WINDOW = "2m"
"""Stands for Grafana's $__rate_interval: it holds all requests."""
KNOWN_LINT = 'pdlaunch_iteration_tokens_total non-counter metrics should not have "_total" suffix'
"""The name is vLLM's."""
FOUND_LINT = 3
"""promtool's exit code where it objects to names."""


def panels() -> Iterator[tuple[str, str, str]]:
    """Dashboard, title and query of every target of every panel."""
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield path.stem, panel["title"], target["expr"]


def filled_in(expression: str) -> str:
    """The query as Grafana sends it, with all engines and pairs chosen."""
    for name, value in {"$__rate_interval": WINDOW}.items():
        expression = expression.replace(name, value)
    for name in ("$engine", "$prefill", "$decode"):
        expression = expression.replace(name, ".*")
    assert "$" not in expression
    return expression


def test_the_rules_are_clean(promtool: Callable[..., str]) -> None:
    for path in sorted((GRAFANA / "rules").glob("*.yml")):
        assert "SUCCESS" in promtool("check", "rules", str(path))
    promtool("check", "config", str(GRAFANA / "prometheus.yml"))


def test_every_alert_fires_when_it_should(promtool: Callable[..., str]) -> None:
    """alerts.yml of this folder tells of series, and which alerts they raise."""
    assert "SUCCESS" in promtool("test", "rules", str(Path(__file__).parent / "alerts.yml"))


def test_the_metrics_are_clean(
    deployment: Deployment, prometheus: Prometheus, promtool: Callable[..., str]
) -> None:
    page = Api(deployment.url).get("/metrics")[1]
    assert "_created" not in page
    said = promtool("check", "metrics", stdin=page, code=FOUND_LINT)
    assert said.splitlines() == [KNOWN_LINT]


def test_every_query_of_every_panel_gives_data(prometheus: Prometheus) -> None:
    empty = []
    for dashboard, title, expression in panels():
        samples = prometheus.query(filled_in(expression))
        if not any(not math.isnan(float(sample["value"][1])) for sample in samples):
            empty.append(f"{dashboard}: {title}: {expression}")
    assert empty == []


def test_every_variable_of_every_dashboard_has_values(prometheus: Prometheus) -> None:
    for path in (GRAFANA / "dashboards").glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                metric, _, label = (
                    variable["definition"].removeprefix("label_values(").partition(", ")
                )
                label = label.removesuffix(")")
                assert prometheus.get(f"label/{label}/values", **{"match[]": metric}), variable


def test_no_alert_fires_over_a_deployment_that_is_well(prometheus: Prometheus) -> None:
    firing = [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    slow = [alert for alert in firing if alert["labels"]["alertname"] == "PdlaunchSlowPath"]
    # How fast a CPU copies is the machine's affair.
    assert [alert for alert in firing if alert not in slow] == []
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}


def test_clients_are_counted_once(deployment: Deployment, prometheus: Prometheus) -> None:
    """The recording rule is what the router counts; the sum over engines is more."""
    rule, rate = "deployment:pdlaunch_requests:rate1m", "sum(rate(pdlaunch_{}_total[1m]))"
    router = Api(deployment.url)

    def agree() -> bool:
        # The minute moves on: what was asked before may have left it.
        assert router.post("/v1/completions", {"prompt": "how many?", "max_tokens": 3})[0] == 200
        of_router = prometheus.value(rate.format("router_request_success"))
        of_engines = prometheus.value(rate.format("request_success"))
        # The rule is evaluated once a second.
        is_rule = prometheus.value(rule) == pytest.approx(of_router, rel=0.2)
        return is_rule and of_engines > 1.5 * of_router > 0

    await_true(agree, "each client is counted once")


def test_pulls_are_there_by_pair_and_path(prometheus: Prometheus) -> None:
    (pulls,) = prometheus.query("pdlaunch_kv_pull_seconds_count")
    (pair,) = prometheus.query("pdlaunch_pair_bytes_per_second")
    for sample in (pulls, pair):
        assert (sample["metric"]["prefill"], sample["metric"]["decode"]) == (
            "prefill-0",
            "decode-0",
        )
        assert sample["metric"]["path"] == pair["metric"]["path"] != ""
    assert float(pulls["value"][1]) > 1
