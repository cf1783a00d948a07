"""``pdlaunch smoke`` with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pdlaunch.cli import smoke
from tests.e2e.conftest import clean_environ, default_environ, launched

NOTHING_MOVES = {
    "PDLAUNCH_KV_TRANSFER__PULL_TIMEOUT_S": "0.000001",
    "PDLAUNCH_KV_TRANSFER__PULL_ATTEMPTS": "1",
    "PDLAUNCH_KV_TRANSFER__LEASE_S": "0.5",
}


def test_smoke_passes(llama: Path) -> None:
    arguments = ("--model", str(llama), "--dtype", "float32", "--kv-cache-memory", "16MiB")
    command = [sys.executable, "-m", "pdlaunch", "smoke", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=default_environ(), check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout
    assert "ok  prefill/decode equals one engine alone, prompt 0" in result.stdout


def test_smoke_fails_when_no_block_moves(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pull times out at once: answers stay right, and smoke says what is wrong. It waits for
    the leases to end, too.
    """
    monkeypatch.setattr(smoke, "_IDLE_TIMEOUT_S", 3.0)
    with launched(llama, environ=clean_environ() | NOTHING_MOVES) as deployment:
        failed = [check for check in smoke.smoke(deployment.url, exact=True) if check.failure]
    assert [check.name for check in failed] == ["KV bytes moved from prefill to decode"]
