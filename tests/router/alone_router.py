"""A router alone, in front of engines of vLLM at Unix sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from pdlaunch.config.roles import Role
from pdlaunch.launch.engines.plan import capabilities_over_http
from pdlaunch.router.admin import SupervisorLink, listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.membership import Member, WatchedMembership, WatchSettings
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.state import RecoverySettings, RouterState
from tests.launch.sidecar.fake_vllm import FakeVllm
from tests.router.conftest import SPEC

PROMPT = [300, 301, 302]


class Keys:
    """Remembers which keys reached an engine."""

    def __init__(self) -> None:
        self.seen: set[str | None] = set()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.seen.add(request.headers.get("Authorization"))
        response: web.StreamResponse = await handler(request)
        return response


class Alone:
    """A router that watches engines of vLLM at Unix sockets; commands go to its admin socket."""

    def __init__(self, folder: Path, *, is_exact: bool = True) -> None:
        self.folder = folder
        self.shares: dict[str, list[int]] = {}
        self.engines: dict[str, FakeVllm] = {}
        self.sockets: dict[str, web.AppRunner] = {}
        self.keys: dict[str, Keys] = {}
        self.pool = EnginePool(time.monotonic)
        self.metrics = RouterMetrics("m")
        settings = WatchSettings(
            served_model_name="m",
            kind="vllm",
            capabilities=capabilities_over_http("vllm"),
            is_exact=is_exact,
            poll_s=0.01,
        )
        self.watch = WatchedMembership(settings, self.pool, self.metrics)
        client = EngineClient(self.watch.key_of)
        self.state = RouterState(
            self.pool,
            client,
            self.metrics,
            RecoverySettings(wait_s=5.0),
            prove_again=self.watch.prove_again,
        )
        spec = msgspec.structs.replace(SPEC, served_model_name="m")
        router = RouterApp(spec, self.state, SupervisorLink(lambda _: None))
        self.app = router.app

    async def open(self) -> None:
        self.watch.announce = self.state.update
        path = self.folder / "admin.sock"
        self.admin = await listen_at_admin_socket(self.app, path)
        self.session = aiohttp.ClientSession(
            "http://localhost", connector=aiohttp.UnixConnector(str(path))
        )

    async def close(self) -> None:
        await self.session.close()
        await self.admin.cleanup()
        await self.watch.close()
        await self.state.close()
        for runner in self.sockets.values():
            await runner.cleanup()

    def url(self, name: str) -> str:
        return f"unix:{self.folder / name}.sock"

    async def start(self, name: str, **behaviour: Any) -> FakeVllm:
        """Start an engine that nobody has told the router of."""
        engine = self.engines[name] = FakeVllm(name, self.shares, **behaviour)
        keys = self.keys.setdefault(name, Keys())
        app = engine.app()
        app.middlewares.append(keys.middleware)
        runner = self.sockets[name] = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(self.folder / f"{name}.sock")).start()
        return engine

    async def stop(self, name: str) -> None:
        await self.sockets.pop(name).cleanup()

    def add(self, name: str, key: str | None = None) -> None:
        roles: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "both": "both"}
        role = roles[name.partition("-")[0]]
        self.watch.add(Member(name, role, self.url(name), key), "config")

    async def pair(self) -> None:
        for name in ("prefill-0", "decode-0"):
            await self.start(name)
            self.add(name)
        await self.until(lambda: self.ready == {"prefill-0", "decode-0"})

    @property
    def ready(self) -> set[str]:
        return {engine.name for engine in self.pool.engines if engine.ready}

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.pool.engines if engine.name == name)

    def reason(self, name: str) -> str:
        return next((engine.reason for engine in self.pool.engines if engine.name == name), "")

    def outcomes(self, outcome: str) -> float:
        return self.metric(f'pdlaunch_router_canaries_total{{outcome="{outcome}"}}')

    def metric(self, name: str) -> float:
        lines = self.metrics.text().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(120):
            while not condition():  # noqa: ASYNC110 - what is waited for is plain state
                await asyncio.sleep(0.005)

    async def complete(self, prompt: Sequence[int] = PROMPT) -> tuple[int, dict[str, Any]]:
        body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        async with self.session.post("/v1/completions", json=body) as response:
            return response.status, await response.json()

    async def command(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        async with self.session.request(method, path, json=body) as response:
            return response.status, await response.json()


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Alone]:
    alone = Alone(tmp_path)
    await alone.open()
    yield alone
    await alone.close()
