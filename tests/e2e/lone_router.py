"""Runs ``pdlaunch router``, or the real vllm-router, for running engines."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pdlaunch.launch.client.deployment import held_port
from tests.e2e.client import Api
from tests.e2e.waiting import await_true

needs_vllm_router = pytest.mark.skipif(
    importlib.util.find_spec("vllm_router") is None,
    reason="vllm-router is not installed: there is no wheel of it for this machine",
)


@contextlib.contextmanager
def running_router(
    arguments: Sequence[str], environ: Mapping[str, str], log_file: Path
) -> Iterator[str]:
    """Yield the router's URL once it is healthy. It ends with the block, or with this process."""
    command = [sys.executable, "-P", "-m", "pdlaunch", "router", "--stop-on-stdin-eof"]
    command += ["--drain-timeout", "5", *arguments]
    with _running(command, environ, log_file) as (url, process):
        yield url
        process.terminate()
        assert process.wait(120) == 0, log_file.read_text()


@contextlib.contextmanager
def running_vllm_router(
    *, prefill: Sequence[str], decode: str, api_key: str, log_file: Path
) -> Iterator[str]:
    """Yield the router's URL once it is healthy. It sends ``api_key`` to the engines."""
    command = [
        str(Path(sys.executable).with_name("vllm-router")),
        "--vllm-pd-disaggregation",
        *(flag for url in prefill for flag in ("--prefill", url)),
        *("--decode", decode, "--kv-connector", "nixl"),
        *("--policy", "round_robin", "--host", "127.0.0.1", "--prometheus-host", "127.0.0.1"),
    ]
    environ = os.environ | {"OPENAI_API_KEY": api_key}
    with held_port() as of_metrics:
        command += ["--prometheus-port", str(of_metrics)]
        with _running(command, environ, log_file) as (url, _):
            yield url


@contextlib.contextmanager
def _running(
    command: Sequence[str], environ: Mapping[str, str], log_file: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with (
        held_port() as port,
        log_file.open("wb") as log,
        subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            health = Api(url, timeout_s=5)
            await_true(
                lambda: process.poll() is not None or health.get("/health")[0] == 200,
                "a healthy router",
            )
            assert process.poll() is None, log_file.read_text()
            yield url, process
        finally:
            process.kill()
