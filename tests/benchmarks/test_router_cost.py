"""The engines that cost nothing follow the protocol, and answers are read to their ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from benchmarks.plain_engine import MODEL, VERSION, serve
from benchmarks.router_cost import StreamLoad, held_ports, send_load
from pdlaunch.http.watch.canary import send_canary
from pdlaunch.http.watch.engine_api import EngineApi


@pytest.fixture
async def ports() -> AsyncIterator[list[int]]:
    with held_ports(2) as ports:
        serving = asyncio.ensure_future(serve(ports, 0.001))
        apis = [EngineApi(f"http://127.0.0.1:{port}") for port in ports]
        for api in apis:
            while not await api.is_healthy(5.0):  # noqa: ASYNC110 - it listens soon
                await asyncio.sleep(0)
            await api.close()
        yield ports
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def test_a_canary_takes_them_for_a_pair_of_vllm(ports: list[int]) -> None:
    prefill, decode = (EngineApi(f"http://127.0.0.1:{port}") for port in ports)
    assert await prefill.version(5.0) == VERSION
    proof = await send_canary(prefill, decode, MODEL, is_exact=True)
    assert proof.num_bytes > 0
    await prefill.close()
    await decode.close()


async def test_all_tokens_of_a_load_are_counted(ports: list[int]) -> None:
    load = StreamLoad(num_streams=3, num_requests=7, num_tokens=5, interval_s=0.001)
    seconds, answers = await send_load(ports[1], load)
    assert seconds > 0
    assert [(one.num_tokens, one.has_ended) for one in answers] == [(5, True)] * 7
    assert all(one.first_at is not None and one.first_at >= one.sent_at for one in answers)
    assert all(transit_s >= 0 for one in answers for transit_s in one.transits_s)
