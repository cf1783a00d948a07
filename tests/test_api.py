"""``import pdlaunch``: what it offers, and that a launch gets what was asked for."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pdlaunch
from pdlaunch import api
from pdlaunch.config import sources
from tests.checks.contexts import TINY


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a model without weights."""
    for name in [name for name in os.environ if name.startswith("PDLAUNCH_")]:
        monkeypatch.delenv(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    path = tmp_path / "deploy.yaml"
    path.write_text(
        f"model: {tmp_path}/model\nload_format: dummy\ndevice: cpu\nkv_cache_memory: 1MiB\n"
        "prefill: {replicas: 2, env: {UCX_LOG_LEVEL: warn}}\nkv_transfer: {lease_s: 77}\n"
    )
    return path


def test_it_offers_what_it_says_and_nothing_else() -> None:
    assert dir(pdlaunch) == pdlaunch.__all__
    for name in set(pdlaunch.__all__) - {"__version__"}:
        assert getattr(pdlaunch, name) is getattr(api, name)
        assert getattr(pdlaunch, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Supervisor'"):
        _ = pdlaunch.Supervisor  # type: ignore[attr-defined]


def test_a_configuration_is_loaded_checked_and_planned(file: Path) -> None:
    config = pdlaunch.load_config(file, {"decode.replicas": 3, "port": 0})
    assert (config.config.prefill.replicas, config.config.decode.replicas) == (2, 3)
    report = pdlaunch.check(config)
    assert report.is_ok(), report.findings
    planned = pdlaunch.plan(config)
    assert planned.engines("decode") == ["decode-0", "decode-1", "decode-2"]


def test_what_is_wrong_is_told(file: Path) -> None:
    with pytest.raises(pdlaunch.ConfigError, match=r"prefill\.replicas"):
        pdlaunch.load_config(file, {"prefill.replicas": "many"})
    config = pdlaunch.load_config(file, {"device": "cpu", "enable_cumem_allocator": True})
    assert not pdlaunch.check(config).is_ok()
    with pytest.raises(pdlaunch.ConfigError, match="PD202 enable_cumem_allocator"):
        pdlaunch.plan(config)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a launch would start, read as ``pdlaunch serve`` reads it."""
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def run(
        arguments: list[str], *, environ: dict[str, str], **named: Any
    ) -> Iterator[SimpleNamespace]:
        (path,) = arguments
        seen.update(named, config=sources.load_config(Path(path), environ, {}).config)
        seen["file"] = Path(path).read_text()
        yield SimpleNamespace(url="http://127.0.0.1:1", output=lambda: "words")
        seen["ended"] = True

    monkeypatch.setattr(api, "running_deployment", run)
    return seen


def test_a_launch_has_the_settings_of_its_configuration(
    file: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDLAUNCH_DECODE__REPLICAS", "4")
    monkeypatch.setenv("PDLAUNCH_PREFILL__REPLICAS", "3")
    settings = {"decode.replicas": 2, "api_key": "a-secret", "startup_timeout_s": 100}
    config = pdlaunch.load_config(file, settings)
    with pdlaunch.Launch(config) as launch:
        assert (launch.url, launch.output()) == ("http://127.0.0.1:1", "words")
        assert "ended" not in started
    assert started["ended"]
    assert started["config"] == config.config
    assert (config.config.prefill.replicas, config.config.decode.replicas) == (3, 2)
    assert "a-secret" not in started["file"]
    assert (started["port"], started["log_dir"]) == (None, None)
    assert started["timeout_s"] > 100


def test_a_launch_listens_where_the_configuration_says(file: Path, started: dict[str, Any]) -> None:
    config = pdlaunch.load_config(file, {"port": 9123, "host": "::1", "log_dir": "/logs"})
    with pdlaunch.Launch(config):
        assert (started["host"], started["port"], started["log_dir"]) == ("::1", 9123, "/logs")


def test_a_launch_has_a_url_only_while_it_runs(file: Path, started: dict[str, Any]) -> None:
    launch = pdlaunch.Launch(pdlaunch.load_config(file))
    with pytest.raises(pdlaunch.PdlaunchError, match="inside the `with` block"):
        _ = launch.url
