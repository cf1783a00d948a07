"""check-config --probe and smoke with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pdlaunch.launch.client.smoke import _PROMPTS
from tests.e2e.conftest import default_environ
from tests.e2e.secrecy import places_of
from tests.e2e.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


def pdlaunch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdlaunch", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=default_environ(), check=False
    )


def test_probe_moves_bytes_between_every_pair(tiny_model: Path) -> None:
    flags = (
        "--model",
        str(tiny_model),
        "--prefill",
        "2",
        "--kv-cache-memory",
        "16MiB",
        "--port",
        "0",
    )
    result = pdlaunch("check-config", "--probe", "--format", "json", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    measured = [
        finding for finding in json.loads(result.stdout)["findings"] if finding["rule"] == "PD505"
    ]
    assert [finding["where"] for finding in measured] == [
        f"{prefill}/rank-0 -> decode-0/rank-0" for prefill in ("prefill-0", "prefill-1")
    ]
    assert all("GB/s" in finding["message"] for finding in measured)


def test_probe_of_what_cannot_start_names_the_reason(tiny_model: Path) -> None:
    flags = (
        "--model",
        str(tiny_model),
        "--kv-cache-memory",
        "16MiB",
        "--port",
        "0",
        "--startup-timeout",
        "0.5",
    )
    result = pdlaunch("check-config", "--probe", "--format", "json", *flags)
    assert result.returncode == 1
    (finding,) = (
        finding for finding in json.loads(result.stdout)["findings"] if finding["rule"] == "PD501"
    )
    assert "0.5 s" in finding["message"]


def test_smoke_passes_and_writes_junit(tiny_model: Path, tmp_path: Path) -> None:
    report = tmp_path / "smoke.xml"
    arguments = ("--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "16MiB")
    page = tmp_path / "reports" / "smoke.html"
    result = pdlaunch("smoke", "--junit", str(report), "--report", str(page), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    for said in ("checks passed", "prompt 0", "1 prefill (float32, cpu, TP 1)", "torch"):
        assert said in page.read_text()
    texts = {path.name: path.read_text() for path in (page, report)}
    assert places_of(texts, _PROMPTS) == []
    suite = ET.parse(report).getroot()
    assert (suite.get("failures"), int(suite.get("tests", "0"))) == (
        "0",
        len(suite.findall("testcase")),
    )
    assert "prefill/decode equals one engine alone, prompt 0" in {
        case.get("name") for case in suite.findall("testcase")
    }


def test_smoke_fails_when_no_block_moves(tiny_model: Path, tmp_path: Path) -> None:
    """Every pull times out at once: answers stay right, and smoke says what is wrong. It waits for
    the leases to end, too.
    """
    config = tmp_path / "pdlaunch.yaml"
    config.write_text(
        f"model: {tiny_model}\nkv_cache_memory: 16MiB\n"
        "kv_transfer: {pull_timeout_s: 0.000001, pull_attempts: 1, lease_s: 2}\n"
    )
    report = tmp_path / "smoke.xml"
    result = pdlaunch("smoke", str(config), "--junit", str(report))
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [
        case.get("name") for case in ET.parse(report).getroot() if case.find("failure") is not None
    ]
    assert failed == ["KV bytes moved from prefill to decode"]
