"""examples/grafana: what can be said of it without Prometheus and Grafana."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, generate_latest

from pdlaunch.engine.server.engine_service import ServerMetrics
from pdlaunch.router.metrics import RouterMetrics

GRAFANA = Path(__file__).parents[1] / "examples" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


def load(name: str) -> Any:
    return yaml.safe_load((GRAFANA / name).read_text())


def test_both_services_listen_on_loopback_alone() -> None:
    services = load("compose.yaml")["services"]
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    (source,) = load("provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"


def test_no_rule_of_a_deployment_adds_up_engines() -> None:
    for group in load("rules/recording.yml")["groups"]:
        for rule in group["rules"]:
            if rule["record"].startswith("deployment:"):
                metrics = set(re.findall(r"\bpdlaunch_\w+", rule["expr"]))
                recorded = set(re.findall(r"deployment:(pdlaunch_\w+)", rule["expr"]))
                assert metrics
                assert all(name.startswith("pdlaunch_router_") for name in metrics - recorded)


def test_every_metric_of_panels_rules_and_alerts_is_one_of_ours() -> None:
    registry = CollectorRegistry()
    ServerMetrics(registry, engine="prefill-0", role="prefill", model_name="m")
    page = (RouterMetrics("m").text() + generate_latest(registry)).decode()
    known: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE):
        endings = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        known |= {name + ending for ending in endings}
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    for path in (GRAFANA / "rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            asked += [rule["expr"] for rule in group["rules"]]
    # Names that rules record have a colon before or behind them.
    names = set(re.findall(r"(?<![:\w])pdlaunch_\w+\b(?!:)", " ".join(asked)))
    assert len(names) > 50
    assert names - known == set()


def test_dashboards_have_ids_of_their_own() -> None:
    found = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({dashboard["uid"] for dashboard in found}) == len(found) == 3
    for dashboard in found:
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
