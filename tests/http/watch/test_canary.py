from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pdlaunch.errors import ProtocolError
from pdlaunch.http.watch import canary
from pdlaunch.http.watch.canary import (
    CACHED_AT_PREFILL,
    NUM_TOKENS,
    Canaries,
    CanaryDied,
    Proof,
    send_canary,
)
from pdlaunch.http.watch.engine_api import EngineApi
from tests.launch.sidecar.fake_vllm import BLOCK_SIZE, BYTES_OF_TOKEN, FakeVllm, listen
from tests.router.fake_engine import until


@contextlib.asynccontextmanager
async def served(*engines: FakeVllm, folder: Path) -> AsyncIterator[list[EngineApi]]:
    paths = [folder / f"{engine.name}.sock" for engine in engines]
    runners = [await listen(engine, path) for engine, path in zip(engines, paths, strict=True)]
    apis = [EngineApi(f"unix:{path}") for path in paths]
    try:
        yield apis
    finally:
        for api in apis:
            await api.close()
        for runner in runners:
            await runner.cleanup()


def pair() -> tuple[FakeVllm, FakeVllm]:
    shares: dict[str, list[int]] = {}
    return FakeVllm("p", shares), FakeVllm("d", shares)


async def send(prefill: FakeVllm, decode: FakeVllm, folder: Path, *, is_exact: bool) -> Proof:
    async with served(prefill, decode, folder=folder) as (prefill_api, decode_api):
        return await send_canary(prefill_api, decode_api, "m", is_exact=is_exact)


async def test_a_good_pair_moves_the_blocks_of_a_new_prompt(tmp_path: Path) -> None:
    prefill, decode = pair()
    first = await send(prefill, decode, tmp_path, is_exact=True)
    await send(prefill, decode, tmp_path, is_exact=True)
    length = 2 * BLOCK_SIZE + 1
    assert first.num_bytes == BYTES_OF_TOKEN * length
    handed, other = (body for body in prefill.bodies if body["max_tokens"] == 1)
    assert len(handed["prompt"]) == length
    assert handed["prompt"] != other["prompt"]
    assert decode.bodies[0]["max_tokens"] == NUM_TOKENS <= 4


async def test_decode_that_computes_the_prompt_itself_is_found(tmp_path: Path) -> None:
    prefill, decode = pair()
    decode.moves_bytes = False
    with pytest.raises(CanaryDied, match="computed the prompt itself") as caught:
        await send(prefill, decode, tmp_path, is_exact=True)
    assert not caught.value.fatal


async def test_bytes_of_other_requests_prove_nothing(tmp_path: Path) -> None:
    """Decode reads blocks of others meanwhile, and has computed the canary itself."""
    prefill, decode = pair()
    decode.moves_bytes, decode.num_bytes_of_others = False, 7_000_000
    with pytest.raises(CanaryDied, match=f"itself: {2 * BLOCK_SIZE + 1} tokens") as caught:
        await send(prefill, decode, tmp_path, is_exact=True)
    assert not caught.value.fatal


async def test_a_proof_by_bytes_alone_says_so(tmp_path: Path) -> None:
    """Of an engine that does not tell what it had cached, nothing better is known."""
    prefill, decode = pair()
    decode.tells_cached = False
    assert not (await send(prefill, decode, tmp_path, is_exact=True)).is_told
    decode.moves_bytes = False
    with pytest.raises(CanaryDied, match="computed the prompt itself"):
        await send(prefill, decode, tmp_path, is_exact=True)
    decode.tells_cached = decode.moves_bytes = True
    assert (await send(prefill, decode, tmp_path, is_exact=True)).is_told


async def test_what_prefill_had_cached_is_not_taken_for_what_decode_has_read(
    tmp_path: Path,
) -> None:
    prefill, decode = pair()
    await send(prefill, decode, tmp_path, is_exact=True)
    assert CACHED_AT_PREFILL not in decode.bodies[0]["kv_transfer_params"]


async def test_other_blocks_are_found_by_the_tokens(tmp_path: Path) -> None:
    prefill, decode = pair()
    decode.garbles = True
    with pytest.raises(CanaryDied, match="other KV blocks") as caught:
        await send(prefill, decode, tmp_path, is_exact=True)
    assert caught.value.fatal


@pytest.mark.parametrize(("error", "dies"), [(0.1, False), (0.5, True)])
async def test_logprobs_in_16_bits_may_differ_a_little(
    tmp_path: Path, error: float, dies: bool
) -> None:
    prefill, decode = pair()
    decode.logprob_error = error
    with pytest.raises(CanaryDied) if dies else contextlib.nullcontext():
        await send(prefill, decode, tmp_path, is_exact=False)


async def test_prefill_without_a_connector_is_named(tmp_path: Path) -> None:
    prefill, decode = pair()
    prefill.has_connector = False
    with pytest.raises(CanaryDied, match="no KV connector"):
        await send(prefill, decode, tmp_path, is_exact=True)


async def test_an_engine_that_does_not_answer_is_no_verdict_on_the_pair(tmp_path: Path) -> None:
    gone = EngineApi(f"unix:{tmp_path / 'nobody.sock'}")
    try:
        with pytest.raises(ProtocolError, match="/metrics"):
            await send_canary(gone, gone, "m", is_exact=True)
        assert await gone.is_healthy(1.0) is None
    finally:
        await gone.close()


class Pairs:
    """Answers canaries as the test says, and remembers what was told of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(canary, "FIRST_RETRY_S", 0.001)
        self.works = False
        self.told: list[bool] = []
        self.canaries: Canaries[str] = Canaries(self._send, self._tell)

    async def _send(self, pair: str) -> Proof:
        if self.works:
            return Proof(seconds=0.1, num_bytes=1, transfer_s=0.0)
        raise ValueError("nonsense")

    def _tell(self, pair: str, result: Proof | CanaryDied) -> None:
        self.told.append(isinstance(result, Proof))


async def test_canaries_are_sent_until_one_comes_through_and_again_after_a_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = Pairs(monkeypatch)
    pairs.canaries.prove(["a"])
    await until(lambda: len(pairs.told) > 2)
    assert "nonsense" in str(pairs.canaries.results["a"])
    pairs.works = True
    await until(lambda: pairs.told[-1])
    num_told = len(pairs.told)
    pairs.canaries.prove(["a"])
    await asyncio.sleep(0.01)
    assert len(pairs.told) == num_told
    assert pairs.canaries.doubt(["a"])
    assert not pairs.canaries.doubt(["a"])
    pairs.canaries.prove(["a"])
    await until(lambda: len(pairs.told) > num_told)
    await pairs.canaries.close()


async def test_a_pair_that_failed_and_left_is_proven_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = Pairs(monkeypatch)
    pairs.canaries.prove(["a"])
    await until(lambda: pairs.told)
    pairs.canaries.prove([])
    assert not pairs.canaries.pairs()
    pairs.works = True
    pairs.canaries.prove(["a"])
    await until(lambda: pairs.told[-1])
    await pairs.canaries.close()
