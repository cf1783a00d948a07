"""Measures what a router costs in front of engines that cost next to nothing
(``plain_engine.py``).

::

    client ──▶ router ──▶ prefill, decode    time, processor time and memory of the router
    client ─────────────▶ prefill, decode    the same answers without it

``python -m tests.labs.router_cost`` prints a row of JSON for each load. With
``--router vllm-router`` it measures vLLM's own router instead, at the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import held_port
from tests.labs.plain_engine import MODEL, STAMP

Router = Literal["pdlaunch", "vllm-router", "none"]
START_TIMEOUT_S = 120.0
PROMPT = "word " * 64


class StreamLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Says what clients send."""

    num_streams: int
    """Streams at a time."""
    num_requests: int
    num_tokens: int
    interval_s: float
    """Between two tokens of a stream."""


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what was measured of one load; times of tokens are milliseconds."""

    router: Router
    load: StreamLoad
    num_errors: int
    seconds: float
    tokens_per_s: float
    streams_per_s: float
    ttft_ms: tuple[float, float]
    """Median and 99th percentile, from the request to the first token."""
    transit_ms: tuple[float, float]
    """The same from the engine's sending of a token to its arrival."""
    cpu_us_per_token: float | None
    """Processor time of the router's processes; None without a router."""
    rss_mib: float | None
    """Memory of the router's processes before the load."""
    kib_per_stream: float | None
    """Growth of it while the streams ran, for each of them."""


class _Answer(asyncio.Protocol):
    """Reads one answer; ``done`` is set when it has ended or its connection has."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.sent_at = 0.0
        self.first_at: float | None = None
        self.transits_s: list[float] = []
        self.num_tokens = 0
        self.body = b""
        self.has_ended = False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.sent_at = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        text = self._tail + data
        number = text.count(STAMP)
        if number:
            if self.first_at is None:
                self.first_at = now_ns / 1e9
            self.num_tokens += number
            begin = text.rindex(STAMP) + len(STAMP)
            stamp = text[begin : begin + 32].partition(b'"')
            if stamp[1]:
                self.transits_s.append((now_ns - int(stamp[0])) / 1e9)
        elif not self.num_tokens:
            self.body += data
        # Less than a stamp: none is counted twice, and one that was cut is counted.
        self._tail = text[-(len(STAMP) - 1) :]
        if b"[DONE]" in text:
            self.has_ended = True
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def _request(path: str, body: dict[str, Any]) -> bytes:
    text = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


async def _ask(port: int, body: dict[str, Any]) -> _Answer:
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(
        lambda: _Answer(_request("/v1/completions", body)), "127.0.0.1", port
    )
    try:
        await answer.done
    finally:
        transport.abort()
    return answer


async def send_load(port: int, load: StreamLoad) -> tuple[float, list[_Answer]]:
    """Send all requests of a load; return the seconds that they took, and the answers."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": load.num_tokens, "stream": True}
    numbers = iter(range(load.num_requests))
    answers: list[_Answer] = []

    async def work() -> None:
        for number in numbers:
            answer = await _ask(port, body | {"prompt": f"{number} {PROMPT}"})
            answers.append(answer)

    start_at = time.monotonic()
    await asyncio.gather(*(work() for _ in range(load.num_streams)))
    return time.monotonic() - start_at, answers


def measure(router: Router, port: int, pid: int | None, load: StreamLoad) -> CostRow:
    """Send a load to a router whose process is ``pid``, or to the decode engine itself."""
    rss_before, cpu_before = (_rss_bytes(pid), _cpu_s(pid)) if pid else (0, 0.0)
    peak = rss_before

    async def run() -> tuple[float, list[_Answer]]:
        nonlocal peak

        async def watch() -> None:
            nonlocal peak
            while pid:
                peak = max(peak, _rss_bytes(pid))
                await asyncio.sleep(0.5)

        watching = asyncio.ensure_future(watch())
        try:
            return await send_load(port, load)
        finally:
            watching.cancel()

    seconds, answers = asyncio.run(run())
    num_tokens = sum(answer.num_tokens for answer in answers)
    good = [
        answer for answer in answers if answer.has_ended and answer.num_tokens == load.num_tokens
    ]
    ttft_s = [answer.first_at - answer.sent_at for answer in answers if answer.first_at]
    transits_s = [transit_s for answer in answers for transit_s in answer.transits_s]
    return CostRow(
        router=router,
        load=load,
        num_errors=load.num_requests - len(good),
        seconds=round(seconds, 2),
        tokens_per_s=round(num_tokens / seconds),
        streams_per_s=round(len(good) / seconds, 1),
        ttft_ms=_quantiles_ms(ttft_s),
        transit_ms=_quantiles_ms(transits_s),
        cpu_us_per_token=round((_cpu_s(pid) - cpu_before) / max(num_tokens, 1) * 1e6, 1)
        if pid
        else None,
        rss_mib=round(rss_before / 2**20, 1) if pid else None,
        kib_per_stream=round((peak - rss_before) / 1024 / load.num_streams, 1) if pid else None,
    )


def _quantiles_ms(values_s: Sequence[float]) -> tuple[float, float]:
    if len(values_s) < 2:
        return (0.0, 0.0)
    hundredths = statistics.quantiles(values_s, n=100, method="inclusive")
    return (round(hundredths[49] * 1000, 2), round(hundredths[98] * 1000, 2))


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(pid: int) -> float:
    total = 0.0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _rss_bytes(pid: int) -> int:
    total = 0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


@contextlib.contextmanager
def held_ports(number: int) -> Iterator[list[int]]:
    """Yield ports for servers that are told them, which nobody else gets meanwhile."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(held_port()) for _ in range(number)]


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a command until it answers at ``url``; yield its process id, and end it."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environ or {})}
        )
    try:
        end_at = time.monotonic() + START_TIMEOUT_S
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > end_at:
                raise PdlaunchError(f"{command[0]} does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def router_command(
    router: Router, prefill: str, decode: str, *, port: int, other: int
) -> list[str]:
    """Return the command of a router in front of two engines; ``other``: a free port."""
    if router == "vllm-router":
        return [
            str(Path(sys.executable).with_name("vllm-router")),
            *("--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode),
            *("--kv-connector", "nixl", "--policy", "round_robin", "--log-level", "error"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(other)),
        ]
    return [
        *(sys.executable, "-m", "pdlaunch", "router", "--engine", "vllm"),
        *("--prefill", prefill, "--decode", decode, "--port", str(port)),
    ]


def measure_loads(router: Router, loads: Sequence[StreamLoad]) -> Iterator[CostRow]:
    """Measure all loads, each with processes of its own. Raises PdlaunchError."""
    for load in loads:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            prefill, decode, port, other = stack.enter_context(held_ports(4))
            urls = [f"http://127.0.0.1:{number}" for number in (prefill, decode)]
            engine = [sys.executable, "-m", "tests.labs.plain_engine"]
            engine += [str(prefill), str(decode), str(load.interval_s)]
            stack.enter_context(running(engine, urls[1], Path(folder) / "engines"))
            if router == "none":
                yield measure(router, decode, None, load)
                continue
            pid = stack.enter_context(
                running(
                    router_command(router, urls[0], urls[1], port=port, other=other),
                    f"http://127.0.0.1:{port}",
                    Path(folder) / "router",
                    {"PDLAUNCH_LIMITS__MAX_QUEUED_REQUESTS": str(2 * load.num_streams + 256)},
                )
            )
            # What is done once, such as opening the first connections, is not counted.
            warm = msgspec.structs.replace(load, num_streams=4, num_requests=8, num_tokens=4)
            asyncio.run(send_load(port, warm))
            yield measure(router, port, pid, load)


def main() -> None:
    """Print a row for each load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--router", choices=["pdlaunch", "vllm-router", "none"], default="pdlaunch")
    parser.add_argument("--streams", default="100", help="streams at a time, one or several")
    parser.add_argument("--requests", type=int, help="requests of each load (two rounds)")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens")
    parser.add_argument("--interval-ms", type=float, default=50.0, help="between two tokens")
    arguments = parser.parse_args()
    loads = [
        StreamLoad(
            num_streams=number,
            num_requests=arguments.requests or 2 * number,
            num_tokens=arguments.tokens,
            interval_s=arguments.interval_ms / 1000,
        )
        for number in map(int, arguments.streams.split(","))
    ]
    for row in measure_loads(arguments.router, loads):
        sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
