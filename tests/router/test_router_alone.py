"""Engines that run already, behind a router that watches them: in one process, over sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.roles import Role
from pdlaunch.errors import ConfigError, ProtocolError
from pdlaunch.http import canary
from pdlaunch.http.canary import CanaryDied, Proof
from pdlaunch.http.engine_calls import EngineApi
from pdlaunch.launch.engines import capabilities_over_http
from pdlaunch.protocol.control import Pair, due_pairs
from pdlaunch.router.admin import SupervisorLink, listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.membership import (
    Member,
    Results,
    WatchedMembership,
    WatchSettings,
    judge,
    read_engines_file,
)
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.recovery import RecoverySettings
from pdlaunch.router.state import RouterState
from tests.launch.sidecar.fake_vllm import FakeVllm, answer_of, listen
from tests.router.conftest import SPEC, samples
from tests.router.fake_engine import until

WRONG = CanaryDied("wrong tokens")
PROOF = Proof(seconds=0.1, num_bytes=1000, transfer_s=0.0)


def engines(role: str, number: int) -> list[str]:
    return [f"{role}-{index}" for index in range(number)]


@given(st.data())
def test_each_engine_is_used_or_has_a_reason_and_a_decode_engine_needs_a_proof(
    data: st.DataObject,
) -> None:
    prefill = engines("p", data.draw(st.integers(0, 5)))
    decode = engines("d", data.draw(st.integers(0, 5)))
    due = due_pairs(prefill, decode)
    drawn = st.sampled_from([PROOF, WRONG, None])
    drawn_results = {pair: data.draw(drawn) for pair in sorted(due)}
    results: dict[Pair, Proof | CanaryDied] = {
        pair: result for pair, result in drawn_results.items() if result is not None
    }
    ready, reasons = judge(prefill, decode, results, ready_before=())
    assert ready.isdisjoint(reasons)
    assert ready | set(reasons) == {*prefill, *decode}
    for name in decode:
        of_it = [results.get(pair) for pair in due if name in pair]
        assert (name in ready) == (not of_it or PROOF in of_it)


@pytest.mark.parametrize("wrong", ["p-0", "p-1", "d-0", "d-2"])
def test_one_wrong_engine_does_not_drag_its_peers_along(wrong: str) -> None:
    prefill, decode = engines("p", 2), engines("d", 3)
    results: Results = {
        pair: WRONG if wrong in pair else PROOF for pair in due_pairs(prefill, decode)
    }
    _, reasons = judge(prefill, decode, results, ready_before=())
    assert set(reasons) == {wrong}
    assert reasons[wrong].endswith("wrong tokens")


def test_a_new_engine_waits_and_the_others_do_not() -> None:
    results: Results = {("p-0", "d-0"): PROOF}
    ready, reasons = judge(["p-0", "p-1"], ["d-0"], results, ready_before=("p-0", "d-0"))
    assert ready == {"p-0", "d-0"}
    assert reasons == {"p-1": "its canary with d-0 is due"}


async def test_no_engine_is_sent_a_key_but_its_own(alone: Alone) -> None:
    for name, key in (("prefill-0", None), ("decode-0", "secret-of-decode-0")):
        await alone.start(name)
        alone.add(name, key)
    await until(lambda: not alone.pool.registry.withheld)
    await alone.complete()
    assert (await alone.command("GET", "/metrics-of-nobody"))[0] == 404
    assert alone.engines["prefill-0"].keys == {None}
    assert alone.engines["decode-0"].keys == {"Bearer secret-of-decode-0"}


@pytest.mark.parametrize("held", ["prefill-0", "decode-0"])
async def test_a_prefill_engine_stays_until_its_blocks_are_read(alone: Alone, held: str) -> None:
    """Whether prefill has answered when the drain begins or not, decode reads what it has."""
    await alone.pair()
    prefill, lender = alone.engines["prefill-0"], alone.engine("prefill-0")
    alone.engines[held].go = asyncio.Event()
    num_bodies = len(alone.engines[held].bodies)
    answer = asyncio.ensure_future(alone.complete())
    await until(lambda: len(alone.engines[held].bodies) > num_bodies)
    removal = asyncio.ensure_future(alone.watch.remove("prefill-0", 60.0))
    await until(lambda: lender.state == "draining")
    # Another request, which decode answers alone meanwhile.
    await alone.complete()
    assert not removal.done()
    assert (lender.num_works, lender.num_leases) == ((1, 0) if held == "prefill-0" else (0, 1))
    alone.engines[held].go.set()
    assert await answer
    assert not prefill.shares
    await removal
    assert "prefill-0" not in {engine.name for engine in alone.pool.engines}


def listing(alone: Alone, *names: str) -> str:
    lines = [
        f"- {{name: {name}, role: {name.partition('-')[0]}, url: '{alone.url(name)}'}}\n"
        for name in names
    ]
    return f"engines:\n{''.join(lines)}"


async def test_the_file_s_engines_come_and_go_and_bad_content_changes_nothing(
    alone: Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("prefill-0", "decode-0", "decode-1"):
        await alone.start(name)
    file = tmp_path / "engines.yaml"
    file.write_text(listing(alone, "prefill-0", "decode-0"))
    following = asyncio.ensure_future(alone.watch.follow(file, 5.0))
    try:
        await until(lambda: alone.ready == {"prefill-0", "decode-0"})
        file.write_text("engines: [{role: prefill}]")
        await until(lambda: "the engines stay as they are" in caplog.text)
        assert alone.ready == {"prefill-0", "decode-0"}

        file.write_text(listing(alone, "prefill-0", "decode-1"))
        await until(lambda: alone.ready == {"prefill-0", "decode-1"})
        elsewhere = listing(alone, "prefill-0", "decode-1").replace("decode-1.sock", "../x.sock")
        file.write_text(elsewhere)
        await until(lambda: "write the whole path" in caplog.text)
        assert alone.ready == {"prefill-0", "decode-1"}
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "and nothing else"),
        ("engines: []\nport: 3", "and nothing else"),
        ("engines: {a: b}", "nothing else"),
        ("engines: [{role: prefill}]", "url: Field required"),
        ("engines: [{role: prefill, url: 'http://u:secret@h:1'}]", "api_key_env"),
        ("engines: [{role: prefill, url: 'http://h:1', api_key: secret}]", "api_key"),
        ("engines: ['prefill=http://h:1', 'prefill=http://h:1/']", "the url http://h:1"),
        ("engines: [", "expected the node content"),
        ("engines:\n- role: prefill\n  key: of secret: 1", ":3:17: bad YAML: mapping values"),
        ("engines: [*secret]", ":1:11: bad YAML: aliases are not supported"),
        ("a" * 300_000, "larger than"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_engines_file(file)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.fixture(autouse=True)
def _canaries_follow_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "FIRST_RETRY_S", 0.02)


async def test_a_pair_serves_when_its_canary_has_come_through(alone: Alone) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, moves_bytes=name != "decode-0")
        alone.add(name)
    await until(lambda: alone.outcomes("failed"))
    assert alone.pool.registry.withheld == "starting"
    assert (await alone.ask())[0] == 503
    await until(lambda: "computed the prompt itself" in alone.reason("decode-0"))

    alone.engines["decode-0"].moves_bytes = True
    await until(lambda: alone.ready == {"prefill-0", "decode-0"})
    assert alone.outcomes("proven") == 1
    assert await alone.complete()


async def test_an_engine_that_dies_is_left_and_proven_again_when_it_is_back(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alone.pair()
    before = alone.engine("decode-0")
    await alone.stop("decode-0")
    await until(lambda: alone.engine("decode-0").state == "stalled")
    # It may have died between the questions of one look, of which /health is the first.
    await until(lambda: "/health does not answer" in alone.reason("decode-0"))
    # Those that are left answer alone.
    assert not await alone.complete()

    engine = await alone.start("decode-0", moves_bytes=False)
    await until(lambda: alone.outcomes("failed"))
    assert "decode-0" not in alone.ready
    engine.moves_bytes = True
    await until(lambda: "decode-0" in alone.ready)
    assert alone.engine("decode-0").processes[0] == before.processes[0] + 1
    assert alone.outcomes("proven") == 2
    monkeypatch.setattr(EngineApi, "counts", AsyncMock(side_effect=ProtocolError("no metrics")))
    await until(lambda: alone.reason("decode-0") == "no metrics")
    assert alone.engine("decode-0").state == "starting", "one that is stalled loses its streams"


async def test_a_pair_that_nobody_can_check_is_shown(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    """A vLLM that neither tells nor counts what it has computed."""
    await alone.pair(tells_cached=False, tokens_by_source={})
    decode = alone.engines["decode-0"]
    looks = decode.num_looks
    await until(lambda: decode.num_looks > looks + 1)
    assert [pair.path for pair in alone.state.pool.pairs] == ["canary, unchecked"]
    assert "--enable-prompt-tokens-details" in caplog.text
    # Failed READs are counted by every version.
    num_proven = alone.outcomes("proven")
    decode.num_failed_reads += 1
    await until(lambda: alone.outcomes("proven") > num_proven)


async def test_an_engine_sleeps_when_nothing_runs_or_is_leased_and_is_proven_again(
    alone: Alone,
) -> None:
    await alone.pair(is_sleeping=False)
    prefill = alone.engines["prefill-0"]
    prefill.lends = 0.25
    status, answer = await alone.command("POST", "/sleep?engine=prefill-0&mode=refuse")
    assert (status, answer["error"]["code"]) == (409, "engine_busy")
    assert alone.ready == {"prefill-0", "decode-0"}

    status, answer = await alone.command("POST", "/sleep?engine=prefill-0&level=2")
    assert (status, answer["error"]["param"]) == (400, "query")
    falling = asyncio.ensure_future(alone.command("POST", "/sleep?engine=prefill-0"))
    await until(lambda: alone.engine("prefill-0").state == "draining")
    await alone.complete()
    assert not prefill.is_sleeping, "its blocks are still leased"
    prefill.lends = 0.0
    status, answer = await falling
    asleep = {"engine": "prefill-0", "is_sleeping": True, "num_bytes": 0}
    assert (status, answer["engines"]) == (200, [asleep])
    assert alone.engine("prefill-0").state == "sleeping"
    assert not await alone.complete(), "decode serves alone"

    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0&tags=weights")
    assert answer["engines"][0]["is_sleeping"] is True
    assert alone.ready == {"decode-0"}
    num_proven = alone.outcomes("proven")
    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0")
    assert answer["engines"][0]["is_sleeping"] is False
    await until(lambda: alone.outcomes("proven") > num_proven)
    await until(lambda: alone.ready == {"prefill-0", "decode-0"} and alone.pool.pairs)
    assert await alone.complete()


PROMPT = [300, 301, 302]


class Alone:
    """A router that watches engines of vLLM at Unix sockets; commands go to its admin socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shares: dict[str, list[int]] = {}
        self.engines: dict[str, FakeVllm] = {}
        self.sockets: dict[str, web.AppRunner] = {}
        self.pool = EnginePool(time.monotonic, "pairs")
        self.metrics = RouterMetrics("m")
        settings = WatchSettings(
            served_model_name="m",
            capabilities=capabilities_over_http("vllm"),
            is_exact=True,
            poll_s=0.01,
        )
        self.watch = WatchedMembership(settings, self.pool, self.metrics)
        self.state = RouterState(
            self.pool,
            EngineClient(self.watch.key_of),
            self.metrics,
            RecoverySettings(wait_s=5.0),
            prove_again=self.watch.prove_again,
        )
        self.watch.announce = self.state.update

    async def open(self) -> None:
        spec = msgspec.structs.replace(SPEC, served_model_name="m")
        router = RouterApp(spec, self.state, SupervisorLink(lambda _: None))
        path = self.folder / "admin.sock"
        self.admin = await listen_at_admin_socket(router.app, path)
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
        self.sockets[name] = await listen(engine, self.folder / f"{name}.sock")
        return engine

    async def stop(self, name: str) -> None:
        await self.sockets.pop(name).cleanup()

    def add(self, name: str, key: str | None = None) -> None:
        roles: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "both": "both"}
        role = roles[name.partition("-")[0]]
        self.watch.add(Member(name, role, self.url(name), key), "config")

    async def pair(self, **behaviour: Any) -> None:
        for name in ("prefill-0", "decode-0"):
            await self.start(name, **behaviour)
            self.add(name)
        await until(lambda: self.ready == {"prefill-0", "decode-0"})

    @property
    def ready(self) -> set[str]:
        return {engine.name for engine in self.pool.engines if engine.ready}

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.pool.engines if engine.name == name)

    def reason(self, name: str) -> str:
        return next(
            (engine.entry.reason for engine in self.pool.engines if engine.name == name), ""
        )

    def outcomes(self, outcome: str) -> float:
        return samples(self.metrics)[f'pdlaunch_router_canaries_total{{outcome="{outcome}"}}']

    async def complete(self) -> bool:
        """Ask for a right answer; return True if decode has read blocks for it."""
        before = sum(engine.num_bytes for engine in self.engines.values())
        status, answer = await self.ask()
        text = "".join(f"<{each}>" for each in answer_of(PROMPT, 4))
        assert (status, answer["choices"][0]["text"]) == (200, text)
        return sum(engine.num_bytes for engine in self.engines.values()) > before

    async def ask(self) -> tuple[int, dict[str, Any]]:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        async with self.session.post("/v1/completions", json=body) as response:
            return response.status, await response.json()

    async def command(self, method: str, path: str) -> tuple[int, Any]:
        async with self.session.request(method, path) as response:
            return response.status, await response.json()


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Alone]:
    alone = Alone(tmp_path)
    await alone.open()
    yield alone
    await alone.close()
