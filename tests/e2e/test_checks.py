"""``pdlaunch smoke`` with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import default_environ
from tests.e2e.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


def pdlaunch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdlaunch", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=default_environ(), check=False
    )


def test_smoke_passes(tiny_model: Path) -> None:
    arguments = ("--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "16MiB")
    result = pdlaunch("smoke", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout
    assert "ok  prefill/decode equals one engine alone, prompt 0" in result.stdout


def test_smoke_fails_when_no_block_moves(tiny_model: Path, tmp_path: Path) -> None:
    """Every pull times out at once: answers stay right, and smoke says what is wrong. It waits for
    the leases to end, too.
    """
    config = tmp_path / "pdlaunch.yaml"
    config.write_text(
        f"model: {tiny_model}\nkv_cache_memory: 16MiB\n"
        "kv_transfer: {pull_timeout_s: 0.000001, pull_attempts: 1, lease_s: 2}\n"
    )
    result = pdlaunch("smoke", str(config))
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED  ")]
    (line,) = failed
    assert line.startswith("FAILED  KV bytes moved from prefill to decode")
