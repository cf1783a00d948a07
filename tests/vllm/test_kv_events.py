"""What vLLM itself publishes of its KV blocks, read as a sidecar reads it."""

import asyncio
import itertools
from pathlib import Path

import pytest
from openai import OpenAI

from pdlaunch.http.engine_calls import Counts
from pdlaunch.http.headers import ROUTE_HEADER
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.launch.sidecar.engine import with_events_at
from pdlaunch.launch.sidecar.kv_events import VllmKVEvents
from pdlaunch.protocol.kv_events import HeldBlocks
from pdlaunch.router.kv_index import PromptTokens
from tests.e2e.client import admin_api
from tests.e2e.waiting import await_true
from tests.vllm.conftest import running_engines

SCRIPT = Path(__file__).with_name("publish_kv_events.py")


@pytest.mark.parametrize("dp_rank", [0, 1])
async def test_a_late_subscriber_learns_what_a_rank_of_vllm_holds(
    dp_rank: int, vllm_command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, held, feed = f"ipc://{tmp_path}/inproc", HeldBlocks(), KVFeed()
    monkeypatch.setattr(feed, "publish", held.apply)
    python = Path(vllm_command).with_name("python")
    publisher = await asyncio.create_subprocess_exec(
        str(python), str(SCRIPT), endpoint, str(dp_rank), stdin=asyncio.subprocess.PIPE
    )
    assert publisher.stdin is not None
    replay = f"inproc.replay_dp{dp_rank}" if dp_rank else "inproc.replay"
    while not (tmp_path / replay).exists():
        await asyncio.sleep(0.1)
        assert publisher.returncode is None
    await asyncio.sleep(2.0)  # both first batches are gone by now
    follower = VllmKVEvents(with_events_at(("vllm",), endpoint), feed, dp_rank)
    running = asyncio.create_task(follower.run())
    salted = PromptTokens(range(100, 180), cache_salt="salt").keys(16)
    while held.num_held(salted) < 5:
        # It may not have subscribed yet.
        publisher.stdin.write(b"\n")
        await asyncio.sleep(0.1)
    assert held.num_held(PromptTokens(range(100, 180)).keys(16)) == 1
    running.cancel()
    follower.close()
    publisher.stdin.close()
    assert await publisher.wait() == 0


def turn(url: str, messages: list[dict[str, str]]) -> tuple[str, str]:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.with_raw_response.create(
        model="smollm2",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=48,
        temperature=0,
    )
    return answer.headers[ROUTE_HEADER], answer.parse().choices[0].message.content or ""


def test_the_next_turn_of_a_chat_goes_to_the_engine_that_has_its_answer(
    vllm_command: str, tmp_path: Path
) -> None:
    numbers = itertools.count(1)

    def follows_its_blocks() -> bool:
        said = f"This is chat {next(numbers)}. " + "Tell me a story about a fox. " * 25
        messages = [{"role": "user", "content": said}]
        first, answer = turn(launch.url, messages)
        messages.append({"role": "assistant", "content": answer})
        second, _ = turn(launch.url, [*messages, {"role": "user", "content": "Go on."}])
        is_alone = second == 'decode-0; kind=decode; reason="little is left to compute"'
        return first.startswith("prefill-0->decode-0;") and is_alone

    environ = {"PDLAUNCH_ROUTING": "load"}
    with running_engines(tmp_path, vllm_command, {"block_size": 32}, environ=environ) as launch:
        # At first the router has neither the tokenizer nor the blocks of all engines.
        await_true(follows_its_blocks, "the next turn is computed where its blocks are", 120)
        decode = admin_api(launch.url).engine("decode-0")
        assert Counts(decode.get("/metrics")[1]).kv_cache_tokens > 512
