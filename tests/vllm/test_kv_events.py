"""What vLLM itself publishes of its KV blocks, read as a sidecar reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.launch.sidecar.engine import with_events_at
from pdlaunch.launch.sidecar.kv_events import VllmKVEvents
from pdlaunch.protocol.kv_events import HeldBlocks
from pdlaunch.router.kv_index import PromptTokens

SCRIPT = Path(__file__).with_name("publish_kv_events.py")


async def test_a_late_subscriber_learns_what_vllm_holds(
    vllm_command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, held, feed = f"ipc://{tmp_path}/e", HeldBlocks(), KVFeed()
    monkeypatch.setattr(feed, "tell", held.apply)
    python = Path(vllm_command).with_name("python")
    publisher = await asyncio.create_subprocess_exec(
        str(python), str(SCRIPT), endpoint, stdin=asyncio.subprocess.PIPE
    )
    assert publisher.stdin is not None
    while not (tmp_path / "e.replay").exists():
        await asyncio.sleep(0.1)
        assert publisher.returncode is None
    await asyncio.sleep(2.0)  # both first batches are gone by now
    follower = VllmKVEvents(with_events_at(("vllm",), endpoint), feed)
    running = asyncio.create_task(follower.run())
    await asyncio.sleep(2.0)
    publisher.stdin.write(b"\n")
    salted = PromptTokens(range(100, 180), cache_salt="salt").keys(16)
    while held.num_held(salted) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    assert held.num_held(PromptTokens(range(100, 180)).keys(16)) == 1
    running.cancel()
    follower.close()
    publisher.stdin.write(b"\n")
    assert await publisher.wait() == 0
