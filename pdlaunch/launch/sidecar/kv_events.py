"""Reads the KV events of one vLLM engine, and reports its prefixes to routers.

Each data parallel rank publishes its own events::

    rank ── PUB: numbered batches ──> VllmKVEvents ── keys ──> KVFeed
         <── ROUTER: replay of missing batches ──┘ if it fails, drop all prefixes

Releases of vLLM may hash blocks differently, so pdlaunch computes keys from token ids.
"""

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from pdlaunch.engine.kvcache.prefix_keys import PrefixChanges, Tier, as_bytes, next_keys, root_key
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, KVFeed
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S
from pdlaunch.launch.sidecar.engine import EVENTS_FLAG
from pdlaunch.protocol.kv_events import KVBlocks

REPLAY_TIMEOUT_S = 5.0
_END = (-1).to_bytes(8, "big", signed=True)
_TIERS: dict[object, Tier] = {None: "device", "GPU": "device", "CPU": "host"}
# Kinds of KV groups that keep all blocks from the first token on. Source: vLLM's KVCacheSpecKind.
_WHOLE_KINDS = frozenset(
    {None, "full_attention", "mla_attention", "sink_full_attention", "unknown"}
)

_logger = logging.getLogger(__name__)


class VllmBlocks:
    """Converts events to ``KVBlocks``. Source: vllm/distributed/kv_events.py of 0.24 to 0.33."""

    def __init__(self, dp_rank: int = 0) -> None:
        self._dp_rank = dp_rank
        self._block_size = 0
        self._changes = PrefixChanges()

    def take(self, payload: bytes) -> KVBlocks | None:
        """Return the changes in a batch, None if there are none. Raises ValueError."""
        batch: Any = msgspec.msgpack.decode(payload)
        is_all = False
        for event in batch["events"] if isinstance(batch, dict) else batch[1]:
            kind = event["type"]
            if kind == "AllBlocksCleared":
                is_all, self._changes = True, PrefixChanges()
            elif (tier := _TIERS.get(event.get("medium"))) is not None:
                if kind == "BlockStored":
                    is_all |= self._store(tier, event)
                elif kind == "BlockRemoved":
                    for found in event["block_hashes"]:
                        self._changes.note(tier, found, is_held=False)
        changes = self._changes.take()
        if changes is None and not is_all:
            return None
        stored, removed = changes or ({}, {})
        return KVBlocks(
            block_size=self._block_size,
            dp_rank=self._dp_rank,
            is_all=is_all,
            stored=stored,
            removed=removed,
        )

    def _store(self, tier: Tier, event: dict[str, Any]) -> bool:
        """Record stored blocks; return True if all earlier records are invalid."""
        is_void, block_size, hashes = False, event["block_size"], event["block_hashes"]
        if event.get("kv_cache_spec_kind") not in _WHOLE_KINDS:
            return False
        # Events may have parts of blocks, and blocks of a host tier may have no tokens.
        if block_size > self._block_size:
            is_void, self._changes = self._block_size > 0, PrefixChanges()
            self._block_size = block_size
        whole = block_size == self._block_size
        self._changes.names = dict(self._named(event)) if whole else {}
        for found in hashes:
            self._changes.note(tier, found, is_held=True)
        return is_void

    def _named(self, event: dict[str, Any]) -> Iterator[tuple[bytes, int]]:
        """Yield the hash and key of each block; nothing if the parent block is unknown."""
        hashes, token_ids = event["block_hashes"], event["token_ids"]
        parent, block_size = event["parent_block_hash"], event["block_size"]
        if not hashes or len(token_ids) != len(hashes) * block_size:
            return
        adapter = event.get("lora_name") or ""
        extras = [
            [each for each in extra or () if each != adapter]
            for extra in event.get("extra_keys") or [None] * len(hashes)
        ]
        if parent is not None:
            key = self._changes.find(parent)
        else:
            # Only the first block has the cache salt, as the only string among its extra keys.
            salt = next((each for each in extras[0] if isinstance(each, str)), "")
            extras[0] = [each for each in extras[0] if each != salt]
            key = root_key(adapter=adapter, cache_salt=salt)
        tokens = as_bytes(token_ids)
        for index, (found, extra) in enumerate(zip(hashes, extras, strict=True)):
            if key is None:
                return
            if extra:  # images and the like, which routers do not know
                key = root_key(adapter=repr(extra), cache_salt=str(key))
            begin = 4 * block_size * index
            (key,) = next_keys(key, tokens[begin : begin + 4 * block_size], block_size)
            yield found, key


async def listen_for_routers(path: Path, feed: KVFeed) -> web.AppRunner:
    """Serve the feed at a Unix socket in the launch's folder, which other users cannot open."""
    app = web.Application()
    app.router.add_get(KV_EVENTS_PATH, feed.send)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    return runner


class VllmKVEvents:
    """Reads the KV events of one rank in the event loop. Call ``run`` once, then ``close``."""

    def __init__(self, command: Sequence[str], feed: KVFeed, dp_rank: int = 0) -> None:
        """``command``: the engine's command, which has the endpoints of its events."""
        config = json.loads(command[command.index(EVENTS_FLAG) + 1])
        suffix = f"_dp{dp_rank}" if dp_rank else ""
        self._dp_rank = dp_rank
        self._feed = feed
        self._blocks = VllmBlocks(dp_rank)
        self._next = 0  # number of the next batch
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.set_hwm(0)
        self._events.subscribe(config.get("topic", ""))
        self._events.connect(config["endpoint"] + suffix)
        self._replay_endpoint: str = config["replay_endpoint"] + suffix

    async def run(self) -> None:
        while True:
            *_, place, payload = await self._events.recv_multipart()
            number = int.from_bytes(place, "big")
            if number > self._next:
                await self._catch_up(number)
            if number >= self._next:
                self._take(number, payload)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _take(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        try:
            change = self._blocks.take(payload)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            _logger.warning("KV events cannot be read: %r", error)
            return
        if change is not None:
            self._feed.publish(change)

    async def _catch_up(self, until: int) -> None:
        """Request a replay of missing batches; drop all prefixes if one cannot be replayed."""
        socket = self._context.socket(zmq.DEALER)
        socket.connect(self._replay_endpoint)
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
                while (frames := await socket.recv_multipart())[-1] and _END not in frames[-2:]:
                    number = int.from_bytes(frames[-2], "big")
                    if number == self._next < until:
                        self._take(number, frames[-1])
        except TimeoutError:
            pass
        finally:
            socket.close(linger=0)
        if self._next < until:
            _logger.warning("KV events %d to %d are lost", self._next, until - 1)
            self._next, self._blocks = until, VllmBlocks(self._dp_rank)
            self._feed.publish(KVBlocks(block_size=0, dp_rank=self._dp_rank, is_all=True))
