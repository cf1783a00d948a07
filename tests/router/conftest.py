from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client import generate_latest

from pdlaunch.config.http_names import local_url
from pdlaunch.http.connections import HttpRunner
from pdlaunch.protocol.control import Command, ListedState, PairReady, PairSuspect, Registry
from pdlaunch.protocol.process.bootstrap import ClientKey, RouterSpec
from pdlaunch.router.admin import SupervisorLink
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.main import listen
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.recovery import RecoverySettings
from pdlaunch.router.state import RouterState
from tests.router.fake_engine import FakeEngine

SPEC = RouterSpec(
    host="127.0.0.1",
    port=0,
    served_model_name="tiny",
    max_body_bytes=100_000,
    max_queued_requests=16,
    max_connections=1000,
    request_timeout_s=20.0,
    drain_timeout_s=5.0,
)


def client_key(text: str, name: str = "api_key", **limits: Any) -> ClientKey:
    return ClientKey(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), **limits)


class Stand:
    """A router in front of fake engines, all in one event loop."""

    def __init__(self) -> None:
        self.engines: dict[str, FakeEngine] = {}
        self.version = 0
        self.doubted: list[PairSuspect] = []
        self.pairs: list[PairReady] = []
        """The pairs that are proven."""

    async def start(
        self,
        engines: Sequence[FakeEngine],
        *,
        recovery_wait_s: float = 10.0,
        metrics_s: float = 15.0,
        **fields: Any,
    ) -> None:
        """``fields``: of the router's spec."""
        spec = msgspec.structs.replace(SPEC, **fields)
        for engine in engines:
            await engine.start()
            self.engines[engine.name] = engine
        self.metrics = RouterMetrics("tiny")
        self.pool = EnginePool(time.monotonic)
        client = EngineClient(
            lambda engine: (
                "launch-token" if engine.capabilities.takes_launch_token else "engine-key"
            ),
            probe_s=1.0,
            metrics_s=metrics_s,
        )
        self.state = RouterState(
            self.pool,
            client,
            self.metrics,
            RecoverySettings(wait_s=recovery_wait_s, retry_wait_s=0.01),
            prove_again=self.doubted.append,
            keys=spec.keys,
        )
        self.asked: list[Command] = []
        self.link = SupervisorLink(self.asked.append)
        self.router = RouterApp(spec, self.state, self.link)
        self.tls = None if spec.certificate is None else spec.certificate.context()
        self.runner = HttpRunner(
            self.router.app,
            max_connections=spec.max_connections,
            shutdown_timeout_s=0.1,
            tls=self.tls,
        )
        await self.runner.setup()
        listener = socket.create_server((spec.host, spec.port))
        self.port = port = listener.getsockname()[1]
        await listen(self.runner, [listener.detach()])
        self.url = local_url("127.0.0.1", port, is_tls=self.tls is not None)
        self.session = aiohttp.ClientSession(self.url)
        self.publish()
        await self.state.settled()

    async def start_pair(self, **fields: Any) -> list[FakeEngine]:
        engines = pair()
        await self.start(engines, **fields)
        return engines

    def publish(self, states: Mapping[str, ListedState | None] | None = None) -> None:
        """``states`` of engines that are not as they say; None: they are gone."""
        self.version += 1
        now = {name: engine.state for name, engine in self.engines.items()} | dict(states or {})
        entries = [
            entry
            for name, engine in self.engines.items()
            if (state := now[name]) is not None
            for entry in engine.entries(state)
        ]
        self.state.update(Registry(version=self.version, entries=entries, pairs=self.pairs))

    async def close(self) -> None:
        await self.session.close()
        await self.runner.cleanup()
        await self.state.close()
        for engine in self.engines.values():
            engine.go.set()
            await engine.stop()

    async def post(
        self,
        body: dict[str, Any],
        *,
        path: str = "",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Without a path, send a chat or a completion."""
        path = path or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        async with self.session.post(path, json=body, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, *, status: int = 200) -> Any:
        async with self.session.get(path) as response:
            assert response.status == status
            return await response.json()

    def metric(self, name: str) -> float:
        """The sum of all series whose line begins so, with a whole name."""
        # Tests ask until it changes: with all metrics, asking takes longer than what they wait for.
        family = self.metrics._registry.restricted_registry([name.partition("{")[0]])
        lines = generate_latest(family).decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def die_after(self, engine: FakeEngine, num_chunks: int, *, num_told: int) -> None:
        """Break its stream once the router has passed on ``num_told`` tokens."""
        engine.die_after = num_chunks
        engine.may_die = lambda: self.metric("pdlaunch_router_generation_tokens_total") >= num_told


class Answer:
    def __init__(self, status: int, headers: Mapping[str, str], raw: bytes) -> None:
        self.status = status
        self.headers = headers
        self.raw = raw

    def json(self) -> dict[str, Any]:
        return msgspec.json.decode(self.raw)

    def events(self) -> list[dict[str, Any]]:
        """Events of a stream without the final [DONE], which must be there unless an error ends
        it.
        """
        data = [line[6:] for line in self.raw.decode().split("\n\n") if line]
        events = [msgspec.json.decode(item) for item in data if item != "[DONE]"]
        assert data[-1] == "[DONE]" or "error" in events[-1]
        assert data.count("[DONE]") == (data[-1] == "[DONE]")
        return events

    def choices(self) -> list[dict[str, Any]]:
        """Of an answer, or of all events of a stream."""
        events = self.events() if "event-stream" in self.headers["Content-Type"] else [self.json()]
        return [choice for event in events for choice in event.get("choices", [])]

    def texts(self) -> dict[int, str]:
        texts: dict[int, str] = {}
        for choice in self.choices():
            part = choice.get("text")
            if part is None:
                part = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + part
        return texts

    def finish_reasons(self) -> dict[int, list[str]]:
        reasons: dict[int, list[str]] = {}
        for choice in self.choices():
            if choice.get("finish_reason"):
                reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
        return reasons


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    yield stand
    await stand.close()


def working(engine: Engine) -> AbstractContextManager[object]:
    """Count one stream at an engine for as long as the block runs."""
    return engine.working(time.monotonic, num_prompt_tokens=1, num_streams=1)


def named(stand: Stand, name: str) -> Engine:
    return next(engine for engine in stand.pool.engines if engine.name == name)


def samples(metrics: RouterMetrics) -> dict[str, float]:
    """By name and labels, as they stand on the page."""
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def proof(prefill: str, decode: str, **fields: Any) -> PairReady:
    """Say that KV blocks come from one engine, or rank, to another."""
    seen: dict[str, Any] = {"peer_incarnation": 1, "path": "p2p/memfd"}
    return PairReady(local=decode, peer=prefill, **seen | fields)


def pair() -> list[FakeEngine]:
    return pairs(1)


def pairs(number: int) -> list[FakeEngine]:
    return [
        FakeEngine(f"{role}-{index}", role)
        for role in ("prefill", "decode")
        for index in range(number)
    ]
