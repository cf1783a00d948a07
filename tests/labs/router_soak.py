"""Soaks a router in front of plain engines (``plain_engine.py``): its clients read, leave, or do
not read; its engines are killed, stopped, and started again.

::

    clients ──▶ router ──▶ prefill, 2 x decode    answers, errors; what the router holds afterwards
                  ▲              ▲
                  └ descriptors  └ kill -9, SIGSTOP, each a process of its own

``python -m tests.labs.router_soak --seconds 120`` prints JSON. Each answer must have
all its tokens or end with an error; the router must hold no more descriptors than before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from tests.labs.plain_engine import MODEL, STAMP
from tests.labs.router_cost import held_ports, router_command, running

Kind = Literal["whole", "stream", "leaves", "half a request", "reads late"]
KINDS: tuple[Kind, ...] = ("whole", "stream", "stream", "leaves", "half a request", "reads late")
INTERVAL_S = 0.005
FAULT_EVERY_S = 4.0
AWAY_S = 1.5
"""Time for which a killed or stopped engine is away."""
ANSWER_TIMEOUT_S = 90.0
QUIET_S = 6.0
"""Longer than any connection to an engine rests."""
LONG_TOKENS = 4000
"""An answer that no buffer holds."""


class Holds(msgspec.Struct, frozen=True, kw_only=True):
    """Says what the router's process holds."""

    num_descriptors: int
    num_threads: int
    rss_mib: float


class RouterSoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what has come of a soak."""

    seconds: float
    outcomes: dict[str, int]
    """Requests by kind and outcome."""
    num_kills: int
    num_stops: int
    before: Holds
    """After the first requests, once these have ended."""
    peak: Holds
    after: Holds

    @property
    def is_good(self) -> bool:
        """Tell whether nothing is wrong, without an end, or left."""
        is_right = not any("wrong" in name or "no end" in name for name in self.outcomes)
        return is_right and self.after.num_descriptors <= self.before.num_descriptors


class Engines:
    """Runs engines, each in a process of its own, and makes them fail in turn."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._processes = {port: _start_engine(port) for port in ports}
        self.num_kills = 0
        self.num_stops = 0

    async def fail(self, chance: random.Random) -> None:
        """Kill or stop one of them now and then, and have it back, until cancelled."""
        while True:
            await asyncio.sleep(chance.uniform(0.5, 1.5) * FAULT_EVERY_S)
            port = chance.choice(self._ports)
            if chance.random() < 0.6:
                self.num_kills += 1
                self._processes[port].kill()
                self._processes[port].wait()
                await asyncio.sleep(AWAY_S)
                self._processes[port] = _start_engine(port)
            else:
                self.num_stops += 1
                process = self._processes[port]
                process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(AWAY_S)
                finally:
                    process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def _start_engine(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.labs.plain_engine", str(port), str(INTERVAL_S)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


async def send(port: int, kind: Kind, chance: random.Random) -> str:
    """Send a request as a client of this kind; return what has come of it."""
    num_tokens = LONG_TOKENS if kind == "reads late" else chance.choice((1, 2, 20, 200))
    client = socket.socket()
    client.setblocking(False)
    if kind == "reads late":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=2**16)
    try:
        request = _request(num_tokens, chance.choice((10, 10, 20_000)), stream=kind != "whole")
        if kind == "half a request":
            writer.write(request[: chance.randrange(len(request))])
            await asyncio.sleep(chance.uniform(0, 0.2))
            return "left"
        writer.write(request)
        if kind == "leaves":
            await asyncio.sleep(chance.choice((0, 0, 0.003, 0.02, 0.2)))
            return "left"
        if kind == "reads late":
            await asyncio.sleep(chance.uniform(1, 4))
        return _judge(await reader.read(-1), num_tokens, is_stream=kind != "whole")
    except ConnectionError:
        return "broken off"
    finally:
        writer.transport.abort()


def _request(num_tokens: int, num_words: int, *, stream: bool) -> bytes:
    body = msgspec.json.encode(
        {
            "model": MODEL,
            "prompt": f"{random.random()} " + "word " * num_words,
            "max_tokens": num_tokens,
            "stream": stream,
        }
    )
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def _judge(answer: bytes, num_tokens: int, *, is_stream: bool) -> str:
    status = answer[9:12].decode(errors="replace")
    if status != "200":
        return f"answered {status}" if status else "broken off"
    number = answer.count(STAMP) if is_stream else answer.count(b" word")
    if is_stream and b"[DONE]" not in answer:
        return "ended with an error" if b'{"error"' in answer else "broken off"
    return "right" if number == num_tokens else f"wrong: {number} of {num_tokens} tokens"


async def soak(
    port: int, router: psutil.Process, engines: Engines, seconds: float, num_clients: int, seed: int
) -> RouterSoakReport:
    """Send requests for so long; engines fail until shortly before the end."""
    chance, outcomes = random.Random(seed), Counter[str]()
    held: list[Holds] = []

    async def work(end_at: float) -> None:
        while time.monotonic() < end_at:
            kind = chance.choice(KINDS)
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    outcome = await send(port, kind, chance)
            except TimeoutError:
                outcome = "no end"
            outcomes[f"{kind}: {outcome}"] += 1

    async def watch() -> None:
        while True:
            held.append(_holds(router))
            await asyncio.sleep(1)

    async def clients(for_s: float) -> None:
        end_at = time.monotonic() + for_s
        await asyncio.gather(*(work(end_at) for _ in range(num_clients)))

    await clients(5.0)  # what is made once is not counted
    await asyncio.sleep(QUIET_S)
    before, start_at = _holds(router), time.monotonic()
    besides = [asyncio.ensure_future(engines.fail(chance)), asyncio.ensure_future(watch())]
    try:
        await clients(seconds)
    finally:
        for task in besides:
            task.cancel()
        await asyncio.wait(besides)
    ended_s = time.monotonic() - start_at
    await asyncio.sleep(QUIET_S)
    return RouterSoakReport(
        seconds=round(ended_s, 1),
        outcomes=dict(sorted(outcomes.items())),
        num_kills=engines.num_kills,
        num_stops=engines.num_stops,
        before=before,
        peak=Holds(
            num_descriptors=max(one.num_descriptors for one in held),
            num_threads=max(one.num_threads for one in held),
            rss_mib=max(one.rss_mib for one in held),
        ),
        after=_holds(router),
    )


def _holds(process: psutil.Process) -> Holds:
    return Holds(
        num_descriptors=process.num_fds(),
        num_threads=process.num_threads(),
        rss_mib=round(process.memory_info().rss / 2**20, 1),
    )


@contextlib.contextmanager
def _scene(log: Path) -> Iterator[tuple[int, psutil.Process, Engines]]:
    """Run engines and a router in front of them; yield its port and process."""
    with held_ports(5) as (prefill, first, second, port, other):
        engines = Engines([prefill, first, second])
        try:
            urls = [f"http://127.0.0.1:{number}" for number in (prefill, first, second)]
            command = router_command("pdlaunch", urls[0], urls[1], port=port, other=other)
            command += ["--decode", urls[2], "--served-model-name", MODEL]
            with running(command, f"http://127.0.0.1:{port}", log) as pid:
                yield port, psutil.Process(pid), engines
        finally:
            engines.close()


def main() -> None:
    """Print a report; the exit status is 1 when something is wrong or left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="what the router logs")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        _scene(given.log or Path(folder) / "router") as (port, router, engines),
    ):
        report = asyncio.run(soak(port, router, engines, given.seconds, given.clients, given.seed))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.exit(not report.is_good)


if __name__ == "__main__":
    main()
