"""Runs the real vllm-router in front of a launch's engines."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pdlaunch.launch.client.deployment import held_port
from tests.e2e.waiting import await_true

needs_vllm_router = pytest.mark.skipif(
    importlib.util.find_spec("vllm_router") is None,
    reason="vllm-router is not installed: there is no wheel of it for this machine",
)


@contextlib.contextmanager
def running_vllm_router(
    *, prefill: Sequence[str], decode: str, api_key: str, log_file: Path
) -> Iterator[str]:
    """Yield its URL once it is healthy; it sends ``api_key`` to the engines."""
    command = [
        str(Path(sys.executable).with_name("vllm-router")),
        "--vllm-pd-disaggregation",
        *(flag for url in prefill for flag in ("--prefill", url)),
        *("--decode", decode, "--kv-connector", "nixl"),
        *("--policy", "round_robin", "--host", "127.0.0.1", "--prometheus-host", "127.0.0.1"),
    ]
    environ = os.environ | {"OPENAI_API_KEY": api_key}
    with (
        held_port() as port,
        held_port() as of_metrics,
        log_file.open("wb") as log,
        subprocess.Popen(
            [*command, "--port", str(port), "--prometheus-port", str(of_metrics)],
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            await_true(
                lambda: process.poll() is not None or _is_healthy(url), "vllm-router answers"
            )
            assert process.poll() is None, log_file.read_text()
            yield url
        finally:
            process.kill()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
