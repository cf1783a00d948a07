"""Measures the cost of a router with engines that need almost no CPU time
(``plain_engine.py``).

::

    client ──▶ router ──▶ prefill, decode    latency, CPU time and memory of the router
    client ─────────────▶ prefill, decode    the same answers without a router

``python -m benchmarks.router_cost`` prints a row of JSON for each load. ``--router vllm-router``
measures vLLM's own router instead, with the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.plain_engine import MODEL, STAMP
from pdlaunch.launch.client.deployment import held_port

START_TIMEOUT_S = 120.0
PROMPT = "word " * 64


@dataclass(frozen=True)
class StreamLoad:
    num_streams: int
    """Concurrent streams."""
    num_requests: int
    num_tokens: int
    interval_s: float
    """Time between two tokens of a stream."""


@dataclass
class Answer:
    """The times of a stream. ``transits_s``: from the sending of a token to its arrival."""

    sent_at: float
    first_at: float | None = None
    transits_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    has_ended: bool = False


async def ask(port: int, body: Mapping[str, Any]) -> Answer:
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer, tail = Answer(time.monotonic()), b""
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
    try:
        while not answer.has_ended and (data := await reader.read(65536)):
            now_ns = time.monotonic_ns()
            read = tail + data
            if number := read.count(STAMP):
                answer.first_at = answer.first_at or now_ns / 1e9
                answer.num_tokens += number
                stamp = read[read.rindex(STAMP) + len(STAMP) :][:32].partition(b'"')
                if stamp[1]:
                    answer.transits_s.append((now_ns - int(stamp[0])) / 1e9)
            # One byte less than a stamp, so that a split stamp is counted, and none twice.
            tail = read[-(len(STAMP) - 1) :]
            answer.has_ended = b"[DONE]" in read
    finally:
        writer.transport.abort()
    return answer


async def send_load(port: int, load: StreamLoad) -> tuple[float, list[Answer]]:
    """Send all requests of a load; return the duration in seconds, and the answers."""
    body = {"model": MODEL, "max_tokens": load.num_tokens, "stream": True}
    numbers = iter(range(load.num_requests))
    answers: list[Answer] = []

    async def work() -> None:
        for number in numbers:
            answer = await ask(port, body | {"prompt": f"{number} {PROMPT}"})
            answers.append(answer)

    start_at = time.monotonic()
    await asyncio.gather(*(work() for _ in range(load.num_streams)))
    return time.monotonic() - start_at, answers


def measure(port: int, pid: int | None, load: StreamLoad) -> dict[str, Any]:
    """Send a load to a router whose process is ``pid``, or to the decode engine if that is None.
    The row has the median and 99th percentile of times, in milliseconds.
    """
    rss_before, cpu_before = usage(pid)
    peak = rss_before

    async def run() -> tuple[float, list[Answer]]:
        async def watch() -> None:
            nonlocal peak
            while pid:
                peak = max(peak, usage(pid)[0])
                await asyncio.sleep(0.5)

        watching = asyncio.ensure_future(watch())
        try:
            return await send_load(port, load)
        finally:
            watching.cancel()

    seconds, answers = asyncio.run(run())
    num_tokens = sum(answer.num_tokens for answer in answers)
    good = [each for each in answers if each.has_ended and each.num_tokens == load.num_tokens]
    row = {
        "load": asdict(load),
        "num_errors": load.num_requests - len(good),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(num_tokens / seconds),
        "streams_per_s": round(len(good) / seconds, 1),
        "ttft_ms": quantiles_ms([each.first_at - each.sent_at for each in good if each.first_at]),
        "transit_ms": quantiles_ms([s for each in answers for s in each.transits_s]),
    }
    if pid is None:
        return row
    return row | {
        "cpu_us_per_token": round((usage(pid)[1] - cpu_before) / max(num_tokens, 1) * 1e6, 1),
        "rss_mib": round(rss_before / 2**20, 1),
        "kib_per_stream": round((peak - rss_before) / 1024 / load.num_streams, 1),
    }


def quantiles_ms(values_s: Sequence[float]) -> tuple[float, float]:
    if len(values_s) < 2:
        only_ms = round(sum(values_s) * 1000, 2)
        return only_ms, only_ms
    hundredths = statistics.quantiles(values_s, n=100, method="inclusive")
    return round(hundredths[49] * 1000, 2), round(hundredths[98] * 1000, 2)


def usage(pid: int | None) -> tuple[int, float]:
    """Return memory in bytes and CPU seconds of a process with all its descendants."""
    rss_bytes, cpu_s = 0, 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (
            [] if pid is None else [psutil.Process(pid), *psutil.Process(pid).children(True)]
        ):
            rss_bytes += process.memory_info().rss
            cpu_s += sum(process.cpu_times()[:2])
    return rss_bytes, cpu_s


@contextlib.contextmanager
def held_ports(number: int) -> Iterator[list[int]]:
    """Yield free ports for servers. No other process gets them meanwhile."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(held_port()) for _ in range(number)]


@contextlib.contextmanager
def running(command: Sequence[str], url: str, log: Path, **environ: str) -> Iterator[int]:
    """Start a command, wait until it answers at ``url``, yield its process id, then kill it."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environ})
    try:
        end_at = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > end_at:
                raise RuntimeError(f"{command[0]} does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def router_command(router: str, prefill: str, decode: str, *, port: int, other: int) -> list[str]:
    """Return the command of a router in front of two engines; ``other``: a free port."""
    if router == "vllm-router":
        return [
            *(sys.executable, "-m", "vllm_router.launch_router"),
            *("--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode),
            *("--kv-connector", "nixl", "--policy", "round_robin", "--log-level", "error"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(other)),
        ]
    command = [sys.executable, "-m", "pdlaunch", "router", "--engine", "vllm"]
    return [*command, "--prefill", prefill, "--decode", decode, "--port", str(port)]


def measure_load(router: str, load: StreamLoad) -> dict[str, Any]:
    """Start engines and a router, and measure a load."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        prefill, decode, port, other = stack.enter_context(held_ports(4))
        urls = [f"http://127.0.0.1:{number}" for number in (prefill, decode, port)]
        engine = [sys.executable, "-m", "benchmarks.plain_engine"]
        engine += [str(prefill), str(decode), str(load.interval_s)]
        stack.enter_context(running(engine, urls[1], Path(folder) / "engines"))
        if router == "none":
            return measure(decode, None, load)
        command = router_command(router, urls[0], urls[1], port=port, other=other)
        queued = {"PDLAUNCH_LIMITS__MAX_QUEUED_REQUESTS": str(2 * load.num_streams + 256)}
        pid = stack.enter_context(running(command, urls[2], Path(folder) / "router", **queued))
        # Warm up: work that is done once, such as opening connections, is not counted.
        asyncio.run(send_load(port, replace(load, num_streams=4, num_requests=8, num_tokens=4)))
        return measure(port, pid, load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--router", choices=["pdlaunch", "vllm-router", "none"], default="pdlaunch")
    parser.add_argument("--streams", default="100", help="concurrent streams, such as 10,100")
    parser.add_argument("--requests", type=int, help="requests of each load (two rounds)")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens")
    parser.add_argument("--interval-ms", type=float, default=50.0, help="time between two tokens")
    given = parser.parse_args()
    for number in map(int, given.streams.split(",")):
        num_requests = given.requests or 2 * number
        load = StreamLoad(number, num_requests, given.tokens, given.interval_ms / 1000)
        row = {"router": given.router} | measure_load(given.router, load)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
