"""Simulates all engines of a launch in one process, for ``control_plane``.

The first line of standard input has the keys; each later line starts or stops a simulated process.
The program ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import zmq
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from pdlaunch.protocol.control import (
    Address,
    Alive,
    Capabilities,
    PairReady,
    Ready,
    Register,
    Registry,
    ToSupervisor,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import raise_open_files
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext

SOCKETS_PER_CONTEXT = 400
"""ZMQ allows 1,023 sockets by default."""
TURN_S = 0.1
"""How often all sockets are checked; a poll of thousands of sockets takes milliseconds."""
MODELS = {
    "object": "list",
    "data": [{"id": "simulated", "object": "model", "max_model_len": 8192, "owned_by": "pdlaunch"}],
}


class SimulatedProcess:
    """Sends the messages of a server or a rank on the control channel."""

    def __init__(
        self, socket: zmq.Socket[bytes], name: str, incarnation: int, role: str, url: str
    ) -> None:
        self.socket = socket
        self._name = name
        self._incarnation = incarnation
        self._role = role
        self._is_rank = "/" in name
        self._proven: set[tuple[str, int]] = set()
        # Engines send their heartbeats at different times.
        self.beats_at = time.monotonic() + (hash(name) % 1000) / 100
        address = (
            Address(side_channel="tcp://127.0.0.1:9", requests="tcp://127.0.0.1:9")
            if self._is_rank
            else Address(http=f"{url}/{name}")
        )
        can = Capabilities()
        self._say(
            Register(
                name=name,
                incarnation=incarnation,
                engine_id=EngineId(f"{name}.{incarnation}" if self._is_rank else ""),
                address=address,
                capabilities=Capabilities() if self._is_rank else can,
            )
        )
        self._say(Ready())

    def beat(self) -> None:
        self._say(Alive())

    def hear(self) -> None:
        """Read the latest registry. A decode rank claims that each of its new pairs is proven."""
        latest: Registry | None = None
        while True:
            try:
                message = from_supervisor.decode(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            if isinstance(message, Registry):
                latest = message
        if latest is None or not self._is_rank or self._role != "decode":
            return
        for entry in latest.entries:
            key = (entry.name, entry.incarnation)
            is_peer = entry.kind == "rank" and entry.role == "prefill"
            if is_peer and key not in self._proven:
                self._proven.add(key)
                self._say(
                    PairReady(
                        local=self._name,
                        peer=entry.name,
                        peer_incarnation=entry.incarnation,
                        path="simulated",
                        gigabytes_per_s=10.0,
                    )
                )

    def _say(self, message: ToSupervisor) -> None:
        self.socket.send(to_supervisor.encode(message))


class Simulator:
    """Holds all simulated processes."""

    def __init__(self, first: dict[str, Any], url: str) -> None:
        self._keys = LaunchKeys(*first["keys"])
        self._control: str = first["control"]
        self._heartbeat_s: float = first["heartbeat_s"]
        self._url = url
        self._processes: dict[str, SimulatedProcess] = {}
        self._context: SecureContext | None = None
        self._num_sockets = 0

    def obey(self, line: dict[str, Any]) -> None:
        """Start or stop a process."""
        if name := line.get("stop"):
            self._processes.pop(name).socket.close(linger=0)
            return
        if self._num_sockets % SOCKETS_PER_CONTEXT == 0:
            self._context = SecureContext(self._keys)
        self._num_sockets += 1
        assert self._context is not None
        socket = self._context.connect(zmq.DEALER, self._control, identity=line["start"].encode())
        self._processes[line["start"]] = SimulatedProcess(
            socket, line["start"], line["incarnation"], line["role"], self._url
        )

    async def run(self) -> None:
        """Read messages and send heartbeats until cancelled."""
        while True:
            now = time.monotonic()
            for process in self._processes.values():
                if int(process.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    process.hear()
                if now >= process.beats_at:
                    process.beats_at = now + self._heartbeat_s
                    process.beat()
            await asyncio.sleep(TURN_S)


async def _models(_: web.Request) -> web.Response:
    return web.json_response(MODELS)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[_PAGE], content_type="text/plain")


_PAGE: web.AppKey[bytes] = web.AppKey("page", bytes)


def _page() -> bytes:
    """Return the /metrics page of an idle engine."""
    from pdlaunch.engine.server.engine_service import ServerMetrics

    registry = CollectorRegistry()
    ServerMetrics(registry, engine="simulated", role="decode", model_name="simulated")
    return generate_latest(registry)


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    return reader


async def main() -> None:
    """Serve until the end of standard input."""
    raise_open_files()
    app = web.Application()
    app[_PAGE] = _page()
    app.router.add_get("/{engine}/v1/models", _models)
    app.router.add_get("/{engine}/metrics", _metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    lines = await _lines()
    simulator = Simulator(json.loads(await lines.readline()), f"http://127.0.0.1:{port}")
    running = asyncio.ensure_future(simulator.run())
    while line := await lines.readline():
        simulator.obey(json.loads(line))
    running.cancel()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
