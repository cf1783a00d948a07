"""Engines that run already, behind a router that watches them: in one process, over sockets."""

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
from pdlaunch.engines.plan import capabilities_over_http
from pdlaunch.errors import RequestError
from pdlaunch.router.admin_socket import listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts
from pdlaunch.router.membership_watch import WatchedMembership
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.process import follow
from pdlaunch.router.state import RecoverySettings, RouterState
from pdlaunch.router.supervisor_link import SupervisorLink
from pdlaunch.router.watched_engine import Member, WatchSettings
from tests.router.conftest import SPEC
from tests.sidecar.fake_vllm import FakeVllm, answer_of, listen

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

    def __init__(
        self, folder: Path, *, urls: tuple[str, ...] | None = None, is_exact: bool = True
    ) -> None:
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
            engine_urls=(f"unix:{folder}",) if urls is None else urls,
            poll_s=0.01,
        )
        self.watch = WatchedMembership(
            settings,
            lambda: self.pool.engines,
            self.metrics.sent_canary,
            lambda *found: self.state.recomputed(*found),
        )
        client = EngineClient(self.watch.key_of, EngineTimeouts())
        self.state = RouterState(
            self.pool,
            client,
            self.metrics,
            RecoverySettings(wait_s=5.0),
            doubt=self.watch.suspect,
        )
        spec = msgspec.structs.replace(SPEC, served_model_name="m")
        router = RouterApp(spec, self.state, SupervisorLink(lambda _: None), self.watch)
        self.app = router.app

    async def open(self) -> None:
        self.following = asyncio.ensure_future(follow(self.watch, self.state))
        path = self.folder / "admin.sock"
        self.admin = await listen_at_admin_socket(self.app, path)
        self.session = aiohttp.ClientSession(
            "http://localhost", connector=aiohttp.UnixConnector(str(path))
        )

    async def close(self) -> None:
        await self.session.close()
        await self.admin.cleanup()
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)
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
        self.watch.add(Member(name, role, self.url(name), "vllm", key), "config", is_trusted=True)

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


async def test_a_pair_serves_when_its_canary_has_come_through(alone: Alone) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, moves_bytes=name != "decode-0")
        alone.add(name)
    await alone.until(lambda: alone.outcomes("failed"))
    assert not alone.pool.serving
    assert (await alone.complete())[0] == 503
    await alone.until(lambda: "computed the prompt itself" in alone.reason("decode-0"))

    alone.engines["decode-0"].moves_bytes = True
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    assert alone.outcomes("proven") == 1
    num_bytes = alone.engines["decode-0"].num_bytes
    assert (await alone.complete())[0] == 200
    assert alone.engines["decode-0"].num_bytes > num_bytes


async def test_an_engine_of_another_model_is_not_used(alone: Alone) -> None:
    await alone.pair()
    await alone.start("decode-1", model="other")
    alone.add("decode-1")
    await alone.until(lambda: alone.reason("decode-1") == "it serves other, not m")
    assert "decode-1" not in alone.ready


async def test_one_wrong_engine_does_not_keep_the_others_from_serving(alone: Alone) -> None:
    await alone.start("prefill-1", has_connector=False)
    alone.add("prefill-1")
    await alone.start("decode-1")
    alone.add("decode-1")
    for name in ("prefill-0", "decode-0"):
        await alone.start(name)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0", "decode-1"})
    assert "no KV connector" in alone.reason("prefill-1")


async def test_an_engine_of_both_roles_serves_without_a_canary(alone: Alone) -> None:
    for name in ("prefill-0", "both-0"):
        await alone.start(name)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "both-0"})
    assert (await alone.complete())[0] == 200
    assert alone.outcomes("proven") == 0


async def test_an_engine_that_dies_is_left_and_proven_again_when_it_is_back(alone: Alone) -> None:
    await alone.pair()
    before = alone.engine("decode-0")
    await alone.stop("decode-0")
    await alone.until(lambda: alone.engine("decode-0").state == "stalled")
    # It may have died between the questions of one look, of which /health is the first.
    await alone.until(lambda: "/health does not answer" in alone.reason("decode-0"))
    # Those that are left answer alone.
    status, answer = await alone.complete()
    assert status == 200
    assert answer["choices"][0]["text"] == "".join(f"<{each}>" for each in answer_of(PROMPT, 4))

    engine = await alone.start("decode-0", moves_bytes=False)
    await alone.until(lambda: alone.outcomes("failed"))
    assert "decode-0" not in alone.ready
    engine.moves_bytes = True
    await alone.until(lambda: "decode-0" in alone.ready)
    assert alone.engine("decode-0").processes[0] == before.processes[0] + 1
    assert alone.outcomes("proven") == 2


async def test_a_pair_that_has_failed_requests_is_proven_again(alone: Alone) -> None:
    await alone.pair()
    alone.engines["decode-0"].moves_bytes = False
    alone.pool.failed(alone.engine("decode-0"))
    await alone.until(lambda: "decode-0" not in alone.ready)
    alone.engines["decode-0"].moves_bytes = True
    await alone.until(lambda: "decode-0" in alone.ready)


LONG_PROMPT = list(range(300, 400))


async def untold_pair(alone: Alone, sources: bool = True) -> tuple[FakeVllm, FakeVllm]:
    """Start a pair of which decode does not tell in its answers what it has computed."""
    by_source = ("local_compute", "local_cache_hit", "external_kv_transfer")
    for name in ("prefill-0", "decode-0"):
        counts = dict.fromkeys(by_source, 0) if sources else {}
        await alone.start(name, tells_cached=False, tokens_by_source=counts)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    engines = alone.engines["prefill-0"], alone.engines["decode-0"]
    looks = engines[1].num_looks
    await alone.until(lambda: engines[1].num_looks > looks + 1)
    return engines


def num_recomputes(alone: Alone) -> float:
    name = "pdlaunch_router_silent_recomputes_total"
    return alone.metric(f'{name}{{decode="decode-0",prefill="prefill-0"}}')


async def test_what_answers_do_not_tell_is_seen_in_the_counts(alone: Alone) -> None:
    """Of a decode engine that reads nothing any more, among requests of others."""
    _, decode = await untold_pair(alone)
    for _ in range(3):
        assert (await alone.complete(prompt=LONG_PROMPT))[0] == 200
    looks = decode.num_looks
    await alone.until(lambda: decode.num_looks > looks + 2)
    assert num_recomputes(alone) == 0
    assert alone.state.pool.pairs[0].path == "canary/vllm"

    decode.moves_bytes = False
    # Another router's: computed there, and nothing of it was handed over.
    decode.tokens_by_source["local_compute"] += 5_000
    assert (await alone.complete(prompt=LONG_PROMPT))[0] == 200
    await alone.until(lambda: num_recomputes(alone) == 1)
    await alone.until(lambda: "itself" in alone.reason("decode-0"))
    decode.moves_bytes = True
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    assert num_recomputes(alone) == 1


async def test_a_pair_that_nobody_can_check_is_shown(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    """A vLLM that neither tells nor counts it."""
    _, decode = await untold_pair(alone, sources=False)
    assert [pair.path for pair in alone.state.pool.pairs] == ["canary, unchecked"]
    said = [each for each in caplog.messages if "--enable-prompt-tokens-details" in each]
    assert len(said) == 1
    # Failed READs are counted by every version.
    num_proven = alone.outcomes("proven")
    decode.num_failed_reads += 1
    await alone.until(lambda: alone.outcomes("proven") > num_proven)
    said = [each for each in caplog.messages if "--enable-prompt-tokens-details" in each]
    assert len(said) == 1


async def test_an_engine_sleeps_when_nothing_runs_or_is_leased_and_is_proven_again(
    alone: Alone,
) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, is_sleeping=False)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    prefill, decode = alone.engines["prefill-0"], alone.engines["decode-0"]

    prefill.lends = 0.25
    status, answer = await alone.command("POST", "/sleep?engine=prefill-0&mode=refuse")
    assert (status, answer["error"]["code"]) == (409, "engine_busy")
    assert alone.ready == {"prefill-0", "decode-0"}

    falling = asyncio.ensure_future(alone.command("POST", "/sleep?engine=prefill-0&level=2"))
    await alone.until(lambda: alone.engine("prefill-0").state == "draining")
    assert (await alone.complete())[0] == 200
    assert not prefill.is_sleeping, "its blocks are still leased"
    prefill.lends = 0.0
    status, answer = await falling
    assert (status, answer["engines"]) == (
        200,
        [{"engine": "prefill-0", "is_sleeping": True, "num_bytes": 0}],
    )
    assert alone.engine("prefill-0").state == "sleeping"
    num_bytes = decode.num_bytes
    assert (await alone.complete())[0] == 200
    assert decode.num_bytes == num_bytes, "decode serves alone"

    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0&tags=weights")
    assert answer["engines"][0]["is_sleeping"] is True
    assert alone.ready == {"decode-0"}
    num_proven = alone.outcomes("proven")
    status, answer = await alone.command("POST", "/wake_up?engine=prefill-0")
    assert answer["engines"][0]["is_sleeping"] is False
    await alone.until(lambda: alone.outcomes("proven") > num_proven)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"} and alone.pool.pairs)
    num_bytes = decode.num_bytes
    assert (await alone.complete())[0] == 200
    assert decode.num_bytes > num_bytes


async def test_an_engine_that_others_put_to_sleep_gets_no_work(alone: Alone) -> None:
    for name in ("prefill-0", "decode-0"):
        await alone.start(name, is_sleeping=False)
        alone.add(name)
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    alone.engines["prefill-0"].is_sleeping = True
    await alone.until(lambda: alone.engine("prefill-0").state == "sleeping")
    assert (await alone.complete())[0] == 200
    alone.engines["prefill-0"].is_sleeping = False
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
    assert alone.outcomes("proven") == 2


async def test_an_engine_without_dev_mode_cannot_sleep(alone: Alone) -> None:
    await alone.pair()
    status, answer = await alone.command("POST", "/sleep?engine=decode-0")
    assert (status, answer["error"]["code"]) == (400, "sleep_mode_off")
    status, answer = await alone.command("POST", "/sleep?engine=decode-0&level=3")
    assert (status, "level is 1 or 2" in answer["error"]["message"]) == (400, True)
    assert alone.ready == {"prefill-0", "decode-0"}


async def test_no_engine_is_sent_a_key_but_its_own(alone: Alone) -> None:
    for name, key in (("prefill-0", None), ("decode-0", "secret-of-decode-0")):
        await alone.start(name)
        alone.add(name, key)
    await alone.until(lambda: alone.pool.serving)
    assert (await alone.complete())[0] == 200
    assert (await alone.command("GET", "/metrics-of-nobody"))[0] == 404
    assert alone.keys["prefill-0"].seen == {None}
    assert alone.keys["decode-0"].seen == {"Bearer secret-of-decode-0"}


async def test_commands_add_and_remove_engines_while_requests_run(alone: Alone) -> None:
    await alone.pair()
    await alone.start("decode-1")
    new = {"name": "decode-1", "role": "decode", "url": alone.url("decode-1"), "api_key": "its"}
    assert await alone.command("POST", "/pdlaunch/engines", new) == (
        200,
        {"engine": "decode-1", "url": alone.url("decode-1"), "state": "starting"},
    )
    await alone.until(lambda: "decode-1" in alone.ready)
    assert alone.keys["decode-1"].seen == {"Bearer its"}

    old = alone.engine("decode-0")
    with old.working(num_streams=1):
        removal = asyncio.ensure_future(alone.command("DELETE", "/pdlaunch/engines/decode-0"))
        await alone.until(lambda: old.state == "draining")
        assert (await alone.complete())[0] == 200
        assert not removal.done()
    assert await removal == (200, {"engine": "decode-0", "drained": True})
    await alone.until(lambda: alone.ready == {"prefill-0", "decode-1"})
    assert (await alone.complete())[0] == 200
    assert (await alone.command("DELETE", "/pdlaunch/engines/decode-0"))[0] == 404


async def test_a_drained_engine_gets_no_request_and_keeps_its_proofs(alone: Alone) -> None:
    await alone.pair()
    assert alone.watch.set_drained("decode-7", is_drained=True) == (
        "there is no engine decode-7; there are: decode-0, prefill-0"
    )
    assert alone.watch.set_drained("decode-0", is_drained=True) == ""
    await alone.until(lambda: alone.engine("decode-0").state == "draining")
    assert (await alone.complete())[0] == 200
    assert "no other engine serves" in alone.watch.set_drained("prefill-0", is_drained=True)
    num_canaries = alone.outcomes("proven")
    assert alone.watch.set_drained("decode-0", is_drained=False) == ""
    await alone.until(lambda: "decode-0" in alone.ready)
    assert alone.outcomes("proven") == num_canaries


@pytest.mark.parametrize("held", ["prefill-0", "decode-0"])
async def test_a_prefill_engine_stays_until_its_blocks_are_read(alone: Alone, held: str) -> None:
    """Whether prefill has answered when the drain begins or not, decode reads what it has."""
    await alone.pair()
    prefill, decode = alone.engines["prefill-0"], alone.engines["decode-0"]
    lender = alone.engine("prefill-0")
    alone.engines[held].go = asyncio.Event()
    num_bodies, num_bytes = len(alone.engines[held].bodies), decode.num_bytes
    answer = asyncio.ensure_future(alone.complete())
    await alone.until(lambda: len(alone.engines[held].bodies) > num_bodies)
    removal = asyncio.ensure_future(alone.command("DELETE", "/pdlaunch/engines/prefill-0"))
    await alone.until(lambda: lender.state == "draining")
    # Another request, which decode answers alone meanwhile.
    assert (await alone.complete())[0] == 200
    assert not removal.done()
    assert (lender.num_works, lender.num_leases) == ((1, 0) if held == "prefill-0" else (0, 1))
    event = alone.engines[held].go
    assert event is not None
    event.set()
    status, told = await answer
    text = "".join(f"<{each}>" for each in answer_of(PROMPT, 4))
    assert (status, told["choices"][0]["text"]) == (200, text)
    assert decode.num_bytes > num_bytes
    assert not prefill.shares
    assert await removal == (200, {"engine": "prefill-0", "drained": True})


async def test_an_engine_that_does_not_finish_in_time_goes_all_the_same(alone: Alone) -> None:
    await alone.pair()
    with alone.engine("decode-0").working(num_streams=1):
        path = "/pdlaunch/engines/decode-0?drain_timeout_s=0"
        assert await alone.command("DELETE", path) == (
            200,
            {"engine": "decode-0", "drained": False},
        )


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"url": "http://169.254.169.254"}, 403, "url_not_allowed"),
        ({"url": "unix:/run/docker.sock"}, 403, "url_not_allowed"),
        ({"url": "http://user@127.0.0.1:1"}, 400, "invalid_engine"),
        ({"url": "file:///etc/passwd"}, 400, "invalid_engine"),
        ({"url": "dns+http://localhost:1"}, 400, "invalid_engine"),
        ({"kind": "native"}, 400, "kinds_differ"),
        ({"name": "prefill-0"}, 409, "engine_exists"),
        ({"name": "a/b"}, 400, "invalid_engine"),
        ({"role": "other"}, 400, "invalid_engine"),
        ({"api_key": "two words"}, 400, "invalid_engine"),
        ({"surprise": 1}, 400, "invalid_engine"),
    ],
)
async def test_what_cannot_be_added_is_refused_by_name(
    alone: Alone, change: dict[str, Any], status: int, code: str
) -> None:
    await alone.start("prefill-0")
    alone.add("prefill-0")
    new = {"name": "decode-9", "role": "decode", "url": alone.url("decode-9")} | change
    answered, answer = await alone.command("POST", "/pdlaunch/engines", new)
    assert (answered, answer["error"]["code"]) == (status, code), answer


async def test_without_an_allow_list_nothing_can_be_added(tmp_path: Path) -> None:
    alone = Alone(tmp_path, urls=())
    try:
        with pytest.raises(RequestError, match="engine_urls does not allow unix:/x"):
            alone.watch.add(Member("x", "decode", "unix:/x", "vllm"), "command")
    finally:
        await alone.watch.close()
        await alone.state.close()


async def test_redirects_are_not_followed(alone: Alone, tmp_path: Path) -> None:
    """An engine that answers so would make the router ask, with a body, whom it likes."""
    reached: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        if request.path.startswith("/else"):
            reached.append(request.path)
            return web.json_response({})
        raise web.HTTPTemporaryRedirect(f"/else{request.path}")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", redirect)
    runner = alone.sockets["decode-9"] = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "decode-9.sock")).start()
    alone.add("decode-9")
    await alone.until(lambda: alone.reason("decode-9") == "/health does not say 200")
    engine = alone.engine("decode-9")
    client = alone.state.client
    with pytest.raises(Exception, match="answered 307"):
        await client.ask(engine, "/v1/completions", b"{}", {})
    assert (await client.call(engine, "GET", "/x"))[0] == 307
    assert await client.read_metrics(engine) is None
    assert not await client.is_alive(engine)
    assert reached == []


class Nonsense(FakeVllm):
    """Answers without tokens, while ``is_odd``."""

    is_odd = True

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if not self.is_odd:
            return await super()._complete(request)
        choice = {"index": 0, "token_ids": [], "logprobs": {"token_logprobs": []}}
        return web.json_response({"choices": [choice]})


async def test_an_engine_that_answers_nonsense_is_tried_again(tmp_path: Path) -> None:
    """No answer ends the watch of an engine or the canaries of a pair."""
    alone = Alone(tmp_path, is_exact=False)
    await alone.open()
    try:
        await alone.start("prefill-0")
        alone.add("prefill-0")
        odd = Nonsense("decode-0", alone.shares)
        alone.sockets["decode-0"] = await listen(odd, tmp_path / "decode-0.sock")
        alone.add("decode-0")
        await alone.until(lambda: "ValueError" in alone.reason("decode-0"))
        odd.is_odd = False
        await alone.until(lambda: "decode-0" in alone.ready)
    finally:
        await alone.close()


async def test_engines_that_come_together_are_one_change(alone: Alone) -> None:
    """Each change is a look at all engines: a look for each of them would grow with the square."""
    for index in range(40):
        name = f"decode-{index}"
        alone.watch.add(Member(name=name, role="decode", url=alone.url(name), kind="vllm"), "test")
    registry = await anext(alone.watch.versions())
    assert (registry.version, len(registry.entries)) == (1, 40)
