"""A real Prometheus that scrapes a real deployment, with the rules of examples/grafana."""

import json
import math
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlaunch.launch.client.deployment import held_port
from tests.e2e.agreement import differences
from tests.e2e.client import Api, Deployment, running_deployment
from tests.e2e.conftest import DEMO_ARGUMENTS, clean_environ
from tests.e2e.waiting import await_true

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "examples" / "grafana"
UNPACKED = ROOT / ".venv-prometheus" / "usr" / "bin"
TIMEOUT_S = 120.0


def program(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; skips the test where there is none."""
    found = shutil.which(name, path=f"{UNPACKED}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"there is no {name}: make test-prometheus unpacks it")
    return found


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Runs promtool and returns what it says; fails when its exit code is not ``code``."""

    def run(*arguments: str, stdin: str = "", code: int = 0) -> str:
        done = subprocess.run(
            [program("promtool"), *arguments], input=stdin, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=expression)["result"])

    def value(self, expression: str) -> float:
        """The value of the one sample; NaN when there is none."""
        samples = self.query(expression)
        assert len(samples) < 2
        return float(samples[0]["value"][1]) if samples else math.nan


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    program("prometheus")
    arguments = (*DEMO_ARGUMENTS, "--kv-offload-memory", "64MiB")
    with running_deployment(arguments, environ=clean_environ()) as running:
        yield running


@pytest.fixture(scope="session")
def prometheus(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration but for its target and a scrape every second, after
    requests that it has watched.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(GRAFANA / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [deployment.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with held_port() as port, (folder / "log").open("w") as log:
        command = [
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        running = Prometheus(f"http://127.0.0.1:{port}")
        try:
            await_true(lambda: running.query("pdlaunch_router_engines"), "the first scrape")
            assert differences(deployment.url) == []
            sent = "pdlaunch_router_generation_tokens_total"
            num_sent = Api(deployment.url).metrics()[sent]
            await_true(lambda: running.value(sent) == num_sent, "all was scraped")
            recorded = "deployment:pdlaunch_generation_tokens:rate1m"
            await_true(lambda: running.value(recorded) > 0, "the rules were evaluated")
            yield running
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
