"""Serves slow readers beside other clients: ``python -m benchmarks.slow_readers``.

Slow readers ask for large answers and read 1 KiB a second. Prints the times of other clients with
and without slow readers, and the memory of every process. Compares each answer of the others with
the answer of the bare model. The kernel buffers megabytes for each reader. The router disconnects
readers that read nothing for 20 s.
"""

# ruff: noqa: T201 - a script
from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.api import greedy_body, idle, requests_in_flight, streamed
from tests.e2e.client import Deployment, admin_api
from tests.e2e.conftest import launched
from tests.e2e.tiny_models import greedy, make_tiny_model

NUM_TOKENS = 64
PROMPTS = [list(range(40 + index, 100 + index)) for index in range(4)]
LARGE = {"n": 4, "logprobs": 5, "stream": True}
BYTES_A_READ, PAUSE_S = 512, 0.5


class Others:
    """Clients that read at once; checks their answers, and measures their times between tokens."""

    def __init__(self, url: str, expected: list[list[int]]) -> None:
        self._url = url
        self._expected = expected

    def run(self, seconds: float) -> str:
        """Send requests until the time is over; return counts of answers, and times to tokens."""
        first_s: list[float] = []
        gaps_s: list[float] = []
        outcomes: Counter[str] = Counter()
        ends_at = time.monotonic() + seconds

        def ask(index: int) -> None:
            while time.monotonic() < ends_at:
                at = [time.monotonic()]
                with streamed(self._url, PROMPTS[index], NUM_TOKENS) as tokens:
                    found = [(token, at.append(time.monotonic()))[0] for token in tokens]
                first, *gaps = [after - before for before, after in pairwise(at)]
                first_s.append(first)
                gaps_s.extend(gaps)
                outcomes["equal" if found == self._expected[index] else "wrong"] += 1

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            for each in [pool.submit(ask, index) for index in range(len(PROMPTS))]:
                each.result()
        return f"{dict(outcomes)}; first token {shown(first_s)}; gaps {shown(gaps_s)}"


def shown(times_s: list[float]) -> str:
    ordered = [round(1000 * each) for each in sorted(times_s)]
    middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return f"{middle} ms, p99 {high}, longest {ordered[-1]}"


def read_slowly(url: str, num_tokens: int, ends: threading.Event) -> str:
    """Read a large answer slowly until the answer or the run ends; return the bytes read."""
    body = json.dumps(greedy_body(PROMPTS[0], num_tokens) | LARGE).encode()
    where, num_bytes = urlsplit(url), 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.connect((where.hostname, where.port))
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        try:
            while not ends.wait(PAUSE_S) and (found := client.recv(BYTES_A_READ)):
                num_bytes += len(found)
        except ConnectionError:
            return f"{num_bytes} (disconnected)"
    return str(num_bytes)


def memory_mib(deployment: Deployment) -> dict[str, int]:
    return {
        name: process.memory_info().rss >> 20 for name, process in deployment.processes().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each slow choice")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    ends = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder))
        expected = greedy(model, PROMPTS, NUM_TOKENS)
        with launched(model) as deployment:
            url, others = deployment.url, Others(deployment.url, expected)
            print("alone:  ", others.run(options.seconds))
            print("MiB before", memory_mib(deployment))
            with ThreadPoolExecutor(options.readers) as pool:
                readers = [
                    pool.submit(read_slowly, url, options.tokens, ends)
                    for _ in range(options.readers)
                ]
                time.sleep(2.0)
                print("beside: ", others.run(options.seconds))
                print("MiB during", memory_mib(deployment))
                print(f"requests of slow readers still open: {requests_in_flight(url)}")
                ends.set()
            while not idle(url):
                time.sleep(0.2)
            _, status = admin_api(url).get_object("/pdlaunch/status")
            print("MiB after ", memory_mib(deployment))
            print("bytes read:", *(each.result() for each in readers))
            print("errors:", status["errors"])


if __name__ == "__main__":
    main()
