"""Events of vLLM become keys of prefixes, also where batches are lost on the way."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.launch.sidecar import kv_events
from pdlaunch.launch.sidecar.engine import with_events_at
from pdlaunch.launch.sidecar.kv_events import VllmBlocks, VllmKVEvents
from pdlaunch.protocol.kv_events import HeldBlocks
from pdlaunch.router.kv_index import PromptTokens

BLOCK_SIZE = 4
PROMPT = list(range(100, 120))


def hashes_of(token_ids: Sequence[int], *names: str) -> list[bytes]:
    ends = range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE)
    return [repr((token_ids[:end], names)).encode() for end in ends]


def stored(
    token_ids: list[int],
    begin: int = 0,
    *,
    adapter: str | None = None,
    salt: str = "",
    **fields: Any,
) -> dict[str, Any]:
    """The blocks of a prompt from ``begin`` on, as vLLM tells them."""
    hashes = hashes_of(token_ids, adapter or "", salt)
    first = [adapter, salt] if adapter and salt else [adapter or salt] if adapter or salt else None
    extras = [
        first if index == 0 else [adapter] if adapter else None for index in range(len(hashes))
    ]
    return {
        "type": "BlockStored",
        "block_hashes": hashes[begin:],
        "parent_block_hash": hashes[begin - 1] if begin else None,
        "token_ids": token_ids[begin * BLOCK_SIZE : len(hashes) * BLOCK_SIZE],
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": adapter,
        "extra_keys": extras[begin:],
    } | fields


def removed(hashes: Sequence[bytes], medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium}


def held_after(*events: dict[str, Any]) -> HeldBlocks:
    blocks, held = VllmBlocks(), HeldBlocks()
    for event in events:
        if (change := blocks.take(msgspec.msgpack.encode([0.0, [event]]))) is not None:
            held.apply(change)
    return held


def num_held(held: HeldBlocks, token_ids: list[int], **names: str) -> int:
    return held.num_held(PromptTokens(token_ids, **names).keys(BLOCK_SIZE))


def test_blocks_are_found_by_their_tokens_salt_and_adapter() -> None:
    held = held_after(
        stored(PROMPT[:9]),
        stored(PROMPT, 2),
        stored(PROMPT[:8], salt="s"),
        stored(PROMPT[:12], adapter="sql"),
        stored(PROMPT, 3, adapter="sql"),
        stored(PROMPT[:4], adapter="sql", salt="s"),
    )
    assert held.block_size == BLOCK_SIZE
    assert num_held(held, PROMPT) == 5
    assert num_held(held, PROMPT, cache_salt="s") == 2
    assert num_held(held, PROMPT, adapter="sql") == 5
    assert num_held(held, PROMPT, adapter="sql", cache_salt="s") == 1
    assert num_held(held, PROMPT, cache_salt="sql") == 0


def test_what_routers_cannot_look_up_is_not_taken_for_text() -> None:
    image = stored(PROMPT, extra_keys=[None, [["image", 3]], None, None, None])
    held = held_after(image)
    assert num_held(held, PROMPT) == 1
    # Parts of blocks, groups of which only the end is kept, blocks that follow unknown ones.
    part = stored(PROMPT[:4]) | {"token_ids": PROMPT[:2], "block_size": 2}
    sliding = stored(PROMPT, kv_cache_spec_kind="sliding_window")
    held = held_after(stored([7] * 4), part, sliding, stored(PROMPT, 3))
    assert (num_held(held, PROMPT), len(held)) == (0, 1)


def test_the_host_tier_is_told_apart_from_the_device() -> None:
    hashes = hashes_of(PROMPT, "", "")
    on_host = stored(PROMPT) | {"medium": "CPU", "token_ids": [], "block_size": 0}
    events = [stored(PROMPT), on_host, removed(hashes)]
    held = held_after(*events)
    assert (num_held(held, PROMPT), len(held)) == (5, 0)
    assert num_held(held_after(*events, removed(hashes[1:], "CPU")), PROMPT) == 1
    assert num_held(held_after(*events, {"type": "AllBlocksCleared"}), PROMPT) == 0
    # A tier of which we know nothing.
    assert num_held(held_after(stored(PROMPT, medium="STORAGE")), PROMPT) == 0


class Publisher:
    """Publishes as vLLM does; what is not ``kept`` cannot be had again."""

    def __init__(self, endpoint: str, end: str, *, has_topic: bool) -> None:
        self._context = zmq.asyncio.Context()
        self.events = self._context.socket(zmq.PUB)
        self.events.bind(endpoint + end)
        self.replays = self._context.socket(zmq.ROUTER)
        self.replays.bind(f"{endpoint}.replay{end}")
        self.kept: dict[int, bytes] = {}
        self._topic = [b""] if has_topic else []
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        end = (-1).to_bytes(8, "big", signed=True)
        while True:
            client, _, first = await self.replays.recv_multipart()
            for number, payload in self.kept.items():
                if number >= int.from_bytes(first, "big"):
                    frames = [client, b"", *self._topic, number.to_bytes(8, "big"), payload]
                    await self.replays.send_multipart(frames)
            last = [b"", end] if self._topic else [end, b""]
            await self.replays.send_multipart([client, b"", *last])

    async def publish(self, number: int, event: dict[str, Any]) -> None:
        payload = msgspec.msgpack.encode([0.0, [event]])
        self.kept[number] = payload
        await self.events.send_multipart([b"", number.to_bytes(8, "big"), payload])

    def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)


@pytest.mark.parametrize("dp_rank", [0, 1])
@pytest.mark.parametrize("has_topic", [False, True], ids=["0.24", "0.33"])
async def test_batches_that_are_lost_are_asked_for_and_else_all_is_forgotten(
    tmp_path: Path, dp_rank: int, *, has_topic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "REPLAY_TIMEOUT_S", 60.0)
    command = with_events_at(("vllm",), f"ipc://{tmp_path}/e")
    assert json.loads(command[2])["enable_kv_cache_events"]
    feed = KVFeed(2)
    told, end = feed._ranks[dp_rank], f"_dp{dp_rank}" if dp_rank else ""
    follower = VllmKVEvents(command, feed, dp_rank)
    publisher = Publisher(f"ipc://{tmp_path}/e", end, has_topic=has_topic)
    running = asyncio.create_task(follower.run())
    prompts = [[kind] * 8 for kind in range(9)]

    async def until_held(*kinds: int) -> None:
        while [kind for kind in range(9) if num_held(told, prompts[kind])] != list(kinds):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    # The first ones come before the subscription.
    publisher.kept = {
        number: msgspec.msgpack.encode([0.0, [stored(prompts[number])]]) for number in range(3)
    }
    number = 3
    while not num_held(told, prompts[3]):
        await publisher.publish(number, stored(prompts[3]))
        number += 1
        await asyncio.sleep(0.05)  # a subscription takes a moment
    await until_held(0, 1, 2, 3)
    # One that is late or repeated changes nothing.
    await publisher.publish(1, removed(hashes_of(prompts[1], "", "")))
    await publisher.publish(number, stored(prompts[4]))
    await until_held(0, 1, 2, 3, 4)
    publisher.kept.clear()
    await publisher.publish(number + 2, stored(prompts[5]))
    await until_held(5)
    running.cancel()
    follower.close()
    publisher.close()


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgspec.msgpack.encode([1, [{"type": 3}]])])
async def test_what_cannot_be_read_is_left_out(payload: bytes, tmp_path: Path) -> None:
    feed = KVFeed()
    follower = VllmKVEvents(with_events_at(("vllm",), f"ipc://{tmp_path}/e"), feed)
    follower._take(0, payload)
    follower.close()
