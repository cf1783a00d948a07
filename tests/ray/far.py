"""Asks launches on hosts of namespaces, for the tests with Ray."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.e2e.waiting import await_true
from tests.netns.hosts import Host

TIMEOUT_S = 240.0
PORT = 8000
PROMPT = {"model": "llama", "prompt": [7] * 70, "max_tokens": 8, "temperature": 0}


def until_ready(host: Host, serve: subprocess.Popen[bytes]) -> None:
    def output() -> str:
        return host.file("/tmp/serve.out").read_text(errors="replace")

    def is_ready() -> bool:
        assert serve.poll() is None, output()
        return get(host, "/health")[0] == 200

    await_true(is_ready, output, TIMEOUT_S)


def get(host: Host, path: str, *words: str) -> tuple[int, Any]:
    """Ask the router of a launch on a host; the status is 0 where nobody answers."""
    flags = ("--silent", "--max-time", "60", "--write-out", "\n%{http_code}", *words)
    command = host.command("curl", *flags, f"http://127.0.0.1:{PORT}{path}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text) if text.startswith("{") else text


def answer(host: Host) -> str:
    status, found = get(host, "/v1/completions", "--json", json.dumps(PROMPT))
    assert status == 200, found
    return str(found["choices"][0]["text"])
