"""Pairs that canaries prove, and what is said of engines' answers in another form."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http import canary
from pdlaunch.http.canary import (
    CACHED_AT_PREFILL,
    NUM_TOKENS,
    Canaries,
    CanaryDied,
    Proof,
    send_canary,
)
from pdlaunch.http.engine_calls import MAX_PAGE_BYTES, EngineApi, with_version
from pdlaunch.launch.engines import capabilities_over_http
from tests.launch.sidecar.fake_vllm import BLOCK_SIZE, BYTES_OF_TOKEN, FakeVllm, listen
from tests.router.fake_engine import until

LENGTH = 2 * BLOCK_SIZE + 1


class Pair:
    """A prefill and a decode engine, through which ``send`` sends a canary."""

    def __init__(self, folder: Path) -> None:
        shares: dict[str, list[int]] = {}
        self.prefill, self.decode = FakeVllm("p", shares), FakeVllm("d", shares)
        self._folder = folder

    async def send(self, *, is_exact: bool = True) -> Proof:
        async with contextlib.AsyncExitStack() as stack:
            apis = []
            for engine in (self.prefill, self.decode):
                path = self._folder / f"{engine.name}.sock"
                stack.push_async_callback((await listen(engine, path)).cleanup)
                apis.append(EngineApi(f"unix:{path}"))
                stack.push_async_callback(apis[-1].close)
            return await send_canary(*apis, "m", is_exact=is_exact)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


async def test_a_good_pair_moves_the_blocks_of_a_new_prompt(pair: Pair) -> None:
    first = await pair.send()
    await pair.send()
    assert first.num_bytes == BYTES_OF_TOKEN * LENGTH
    handed, other = (body for body in pair.prefill.bodies if body["max_tokens"] == 1)
    assert len(handed["prompt"]) == LENGTH
    assert handed["prompt"] != other["prompt"]
    asked = pair.decode.bodies[0]
    assert asked["max_tokens"] == NUM_TOKENS <= 4
    # What prefill had cached is not taken for what decode has read.
    assert CACHED_AT_PREFILL not in asked["kv_transfer_params"]


@pytest.mark.parametrize(
    ("faults", "is_exact", "reason", "is_fatal"),
    [
        ({"moves_bytes": False}, True, "computed the prompt itself", False),
        # Decode reads blocks of other requests meanwhile.
        ({"moves_bytes": False, "num_bytes_of_others": 7_000_000}, True, f"{LENGTH} tokens", False),
        ({"moves_bytes": False, "tells_cached": False}, True, "computed the prompt itself", False),
        ({"garbles": True}, True, "wrong KV blocks", True),
        ({"logprob_error": 0.5}, False, "differ by more than", True),
    ],
)
async def test_a_bad_pair_is_found(
    pair: Pair, faults: dict[str, Any], is_exact: bool, reason: str, is_fatal: bool
) -> None:
    for name, value in faults.items():
        setattr(pair.decode, name, value)
    with pytest.raises(CanaryDied, match=reason) as caught:
        await pair.send(is_exact=is_exact)
    assert caught.value.fatal is is_fatal


async def test_logprobs_in_16_bits_may_differ_a_little_and_a_proof_by_bytes_alone_says_so(
    pair: Pair,
) -> None:
    pair.decode.logprob_error = 0.1
    assert (await pair.send(is_exact=False)).is_reported
    # Of an engine that does not tell what it had cached, nothing better is known.
    pair.decode.tells_cached = False
    assert not (await pair.send(is_exact=False)).is_reported


async def test_prefill_without_a_connector_is_named(pair: Pair) -> None:
    pair.prefill.has_connector = False
    with pytest.raises(CanaryDied, match="no KV connector"):
        await pair.send()


async def test_an_engine_that_does_not_answer_is_no_verdict_on_the_pair(tmp_path: Path) -> None:
    gone = EngineApi(f"unix:{tmp_path / 'nobody.sock'}")
    with pytest.raises(ProtocolError, match="/metrics"):
        await send_canary(gone, gone, "m", is_exact=True)
    assert await gone.is_healthy(1.0) is None
    await gone.close()


async def test_canaries_are_sent_until_one_comes_through_and_again_after_a_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(canary, "FIRST_RETRY_S", 0.001)
    send = AsyncMock(side_effect=ValueError("nonsense"))
    told: list[bool] = []
    canaries = Canaries(send, lambda _, result: told.append(isinstance(result, Proof)))
    canaries.prove(["a"])
    await until(lambda: len(told) > 2)
    assert "nonsense" in str(canaries.results["a"])
    canaries.prove([])  # it leaves, and comes back
    assert not canaries.pairs()
    send.side_effect, send.return_value = None, Proof(seconds=0.1, num_bytes=1, transfer_s=0.0)
    canaries.prove(["a"])
    await until(lambda: told[-1])
    num_told = len(told)
    canaries.prove(["a"])
    await asyncio.sleep(0.01)
    assert len(told) == num_told
    assert canaries.doubt(["a"])
    assert not canaries.doubt(["a"])
    canaries.prove(["a"])
    await until(lambda: len(told) > num_told)
    await canaries.close()


BODY_LENGTH = 60_000


class Engine:
    """Answers every question with the same body; ``api`` asks it."""

    body = b""

    def __init__(self, path: Path) -> None:
        self.api = EngineApi(f"unix:{path}")
        self.asks = (self.api.models, self.api.version, self.api.deployment)

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self.body)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine(tmp_path / "engine.sock")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    yield engine
    await engine.api.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    "body",
    [
        b"\xff" * BODY_LENGTH,
        b"a" * BODY_LENGTH,
        b"# TYPE a gauge\na{" + b"x" * BODY_LENGTH,
        b"[" * BODY_LENGTH,
        b'{"a": ' * (BODY_LENGTH // 6),
        b'{"is_sleeping": "\xff"}',
    ],
)
async def test_what_is_wrong_with_an_answer_is_told_in_few_words(
    engine: Engine, body: bytes
) -> None:
    engine.body = body
    for ask in (*engine.asks, engine.api.counts, partial(engine.api.complete, {})):
        with pytest.raises(ProtocolError) as caught:
            await ask(10.0)
        # It is logged, and shown to clients as the reason why an engine is not used.
        assert len(str(caught.value)) < 300
    assert await engine.api.server_info(10.0) is None
    assert await engine.api.is_sleeping(10.0) is None


async def test_an_engine_cannot_hold_up_who_asks_it_by_a_long_answer(engine: Engine) -> None:
    """All of an answer is parsed in the event loop, where nothing else happens meanwhile."""
    api = engine.api
    # A comment alone, which takes no time to parse.
    engine.body = b"a 3\n#".ljust(MAX_PAGE_BYTES, b"-")
    assert (await api.counts(60.0)).total("a") == 3
    engine.body += b"-"
    for ask in (*engine.asks, api.counts, partial(api.complete, {})):
        with pytest.raises(ProtocolError, match=r"its answer has more than \d+ bytes"):
            await ask(60.0)
    assert await api.is_healthy(60.0) is None
    assert await api.server_info(60.0) is None
    assert await api.is_sleeping(60.0) is None


@pytest.mark.parametrize(
    ("version", "continues"),
    [
        ("0.10.2", False),
        ("0.11.0rc1+cpu", True),
        ("0.32.0+cpu", True),
        ("1.0", True),
        ("dev", False),
        ("", False),
    ],
)
def test_streams_of_vllm_go_on_where_token_ids_are_told(version: str, continues: bool) -> None:
    known = with_version(capabilities_over_http("vllm"), version)
    assert (known.version, known.continues, known.can_continue) == (version, continues, continues)
    native = with_version(capabilities_over_http("native"), version)
    assert (native.continues, native.can_continue) == (False, True)
