"""Runs ``pdlaunch router`` in front of engines that run already."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pdlaunch.launch.client.deployment import held_port

START_TIMEOUT_S = 120.0


@contextlib.contextmanager
def running_router(
    arguments: Sequence[str], environ: Mapping[str, str], log_file: Path
) -> Iterator[str]:
    """Yield its URL once it is healthy; it ends with the block, or with this process."""
    command = [sys.executable, "-P", "-m", "pdlaunch", "router", "--stop-on-stdin-eof"]
    command += ["--drain-timeout", "5", *arguments]
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
            until_at = time.monotonic() + START_TIMEOUT_S
            while process.poll() is None and not _is_healthy(url):
                assert time.monotonic() < until_at, log_file.read_text()
                time.sleep(0.1)
            assert process.poll() is None, log_file.read_text()
            yield url
            process.terminate()
            assert process.wait(120) == 0, log_file.read_text()
        finally:
            process.kill()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
