"""Records which engine has which prefixes in its KV cache, as the engines report.

::

    engine ready ──> one stream: all its prefixes, then changes ──> entries ──> ``find``
    engine dead, asleep, drained, restarted, in another role ──> its entries are dropped at once

A wrong entry causes a bad choice of engines, never a wrong token: engines look up and prove blocks
themselves. Each router has its own index.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import suppress

from pdlaunch.config.roles import Role
from pdlaunch.engine.kvcache.prefix_keys import as_bytes, next_keys, root_key
from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import CallError
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import EngineFailure

RECONNECT_S = 1.0
FEW_BLOCKS = 4  # to compute shorter prompts takes less time than to look them up and move blocks

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
        if block_size not in self._keys:
            self._keys[block_size] = next_keys(self._root, self._bytes, block_size)
        return self._keys[block_size]


class KVIndex:
    """Holds the reported prefixes of each engine, by data parallel rank."""

    def __init__(self) -> None:
        self._engines: dict[str, dict[int, HeldBlocks]] = {}

    def begin(self, name: str) -> None:
        """Drop an engine's entries: a new stream begins with all its prefixes."""
        self._engines[name] = {}

    def apply(self, name: str, change: KVBlocks) -> None:
        ranks = self._engines.setdefault(name, {})
        ranks.setdefault(change.dp_rank, HeldBlocks(change.dp_rank)).apply(change)

    def keep(self, names: Iterable[str]) -> None:
        self._engines = {name: self._engines[name] for name in names if name in self._engines}

    @property
    def least_tokens(self) -> int:
        """Return the length of the shortest prompt that is worth tokenizing."""
        ranks = (held for name in self._engines for held in self._ranks(name))
        return FEW_BLOCKS * max((held.block_size for held in ranks), default=0)

    def num_ranks(self, name: str) -> int:
        return len(self._ranks(name)) if name in self else 0

    def __contains__(self, name: str) -> bool:
        return any(held.block_size for held in self._ranks(name))

    def find(self, engine: Engine, prompt: PromptTokens | None) -> tuple[int, int | None]:
        """Return the number of a prompt's tokens that an engine has cached, and the data parallel
        rank that has them. The request must name this rank; None: vLLM may choose.
        """
        ranks = self._ranks(engine.name)
        if prompt is None or not ranks:
            return 0, None
        tokens = {
            held.dp_rank: held.num_held(prompt.keys(held.block_size)) * held.block_size
            for held in ranks
            if held.block_size
        }
        # Ranks that too many running requests name do not count.
        free = [rank for rank in tokens if engine.may_name(rank, len(ranks))]
        best = max(free, key=lambda rank: tokens[rank], default=None)
        least = min(tokens.values()) if len(tokens) == len(ranks) else 0
        if best is None or tokens[best] == least:
            return least, None
        return tokens[best], best

    def age(self) -> None:
        """Halve the counts of new blocks when they exceed the blocks that engines hold."""
        # So the counts cover about the time in which the caches are filled once.
        ranks = [held for name in self._engines for held in self._ranks(name)]
        if sum(held.num_new for held in ranks) > sum(map(len, ranks)):
            for held in ranks:
                held.num_new //= 2

    def num_tokens(self, name: str) -> tuple[int, int]:
        """Return how many tokens an engine has recently stored, and how many fit; 0: unknown."""
        ranks = self._ranks(name)
        return (
            sum(held.num_new * held.block_size for held in ranks),
            sum(held.num_blocks * held.block_size for held in ranks),
        )

    def _ranks(self, name: str) -> Collection[HeldBlocks]:
        return self._engines.get(name, {}).values()


class KVFollower:
    """Reads the KV events of all ready engines. ``follow`` opens the stream of an engine."""

    def __init__(self, index: KVIndex, follow: Follow) -> None:
        self._index = index
        self._follow = follow
        self._tasks: dict[tuple[EngineKey, Role | None], asyncio.Task[None]] = {}

    def update(self, engines: Iterable[Engine]) -> None:
        """Read the KV events of those of ``engines`` that are ready, and of no others."""
        wanted = {(each.key, each.role): each for each in engines if each.ready and each.kv_events}
        for key in self._tasks.keys() - wanted.keys():
            self._tasks.pop(key).cancel()
        self._index.keep({each.name for each in wanted.values()})
        for key in wanted.keys() - self._tasks.keys():
            self._index.begin(wanted[key].name)
            self._tasks[key] = asyncio.ensure_future(self._read(wanted[key]))

    async def close(self) -> None:
        tasks = [*self._tasks.values()]
        self.update(())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, engine: Engine) -> None:
        while True:
            with suppress(CallError, EngineFailure, ProtocolError):
                async for change in self._follow(engine):
                    self._index.apply(engine.name, change)
            # Without the stream, entries would go stale.
            self._index.begin(engine.name)
            _logger.info("the KV events of %s broke off", engine.name)
            await asyncio.sleep(RECONNECT_S)
