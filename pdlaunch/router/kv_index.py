"""Records which engine holds which prefixes, from the engines' own reports.

::

    engine ready ──> one stream: all that it holds, then changes ──> entries ──> ``num_cached``
    engine dead, asleep, drained, restarted, of another role ──> its entries are gone at once

A wrong entry costs one bad choice, never a wrong token: engines look up and prove blocks
themselves. Each router has its own index.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress

from pdlaunch.config.roles import Role
from pdlaunch.engine.kvcache.prefix_keys import as_bytes, next_keys, root_key
from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import CallError
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import EngineFailure

RECONNECT_S = 1.0
FEW_BLOCKS = 4  # shorter prompts are computed sooner than looked up and moved

_logger = logging.getLogger(__name__)

Follow = Callable[[Engine], AsyncIterator[KVBlocks]]


class PromptTokens:
    """Holds the tokens of a prompt, and the keys of its blocks at each block size."""

    def __init__(
        self, token_ids: Sequence[int], *, adapter: str = "", cache_salt: str = ""
    ) -> None:
        self.token_ids = token_ids
        self._root = root_key(adapter=adapter, cache_salt=cache_salt)
        self._bytes = as_bytes(token_ids)
        self._keys: dict[int, list[int]] = {}

    def keys(self, block_size: int) -> list[int]:
        found = self._keys.get(block_size)
        if found is None:
            found = self._keys[block_size] = next_keys(self._root, self._bytes, block_size)
        return found


class KVIndex:
    """Holds the reported prefixes of each engine."""

    def __init__(self) -> None:
        self._engines: dict[str, HeldBlocks] = {}

    def begin(self, name: str) -> HeldBlocks:
        """Forget an engine; return its new, empty entries."""
        held = self._engines[name] = HeldBlocks()
        return held

    def keep(self, names: Iterable[str]) -> None:
        self._engines = {name: self._engines[name] for name in names if name in self._engines}

    @property
    def least_tokens(self) -> int:
        """Return the length of the shortest prompt that is worth tokenizing."""
        return FEW_BLOCKS * max((held.block_size for held in self._engines.values()), default=0)

    def __contains__(self, name: str) -> bool:
        """Return whether an engine has reported anything."""
        held = self._engines.get(name)
        return held is not None and held.block_size > 0

    def num_cached(self, name: str, prompt: PromptTokens | None) -> int:
        """Return how many tokens of a prompt an engine need not compute."""
        held = self._engines.get(name)
        if prompt is None or held is None or not held.block_size:
            return 0
        return held.num_held(prompt.keys(held.block_size)) * held.block_size

    def num_tokens(self, name: str) -> tuple[int, int]:
        """Return the tokens whose blocks an engine's device holds, and has room for; 0: unknown."""
        held = self._engines.get(name)
        if held is None:
            return 0, 0
        return len(held) * held.block_size, held.num_blocks * held.block_size


class KVFollower:
    """Follows the streams of the engines that are ready. ``follow`` opens the stream of one."""

    def __init__(self, index: KVIndex, follow: Follow) -> None:
        self._index = index
        self._follow = follow
        self._tasks: dict[tuple[EngineKey, Role | None], asyncio.Task[None]] = {}

    def update(self, engines: Iterable[Engine]) -> None:
        """Follow the ready ones of these engines, and no others."""
        wanted = {(each.key, each.role): each for each in engines if each.ready and each.kv_events}
        for key in self._tasks.keys() - wanted.keys():
            self._tasks.pop(key).cancel()
        self._index.keep({each.name for each in wanted.values()})
        for key in wanted.keys() - self._tasks.keys():
            held = self._index.begin(wanted[key].name)
            self._tasks[key] = asyncio.ensure_future(self._read(wanted[key], held))

    async def close(self) -> None:
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, engine: Engine, held: HeldBlocks) -> None:
        while True:
            with suppress(CallError, EngineFailure, ProtocolError):
                async for change in self._follow(engine):
                    held.apply(change)
            # Without the stream entries go stale; the next one begins with all of them.
            held.apply(KVBlocks(block_size=0, is_all=True))
            _logger.info("the KV events of %s broke off", engine.name)
            await asyncio.sleep(RECONNECT_S)
