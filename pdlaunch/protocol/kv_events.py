"""Messages with an engine's prefixes: rank 0 to its server, servers and sidecars to routers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Annotated

import msgspec

from pdlaunch.engine.kvcache.prefix_keys import TIERS, Tier
from pdlaunch.protocol.wire import Codec, Message

# Most blocks remembered for one engine, about 70 bytes each; further ones are dropped. So many
# would be a lie, or a cache of 16 million tokens.
MAX_BLOCKS = 1_000_000
# Keys in a message, so that none keeps an event loop for more than 5 ms.
_MAX_KEYS = 32_768


class KVBlocks(Message):
    """Carries the keys of prefixes whose last block an engine holds, or holds no more."""

    block_size: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # tokens
    # tokens / block_size that the device has room for; 0: not known
    num_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    is_all: bool = False  # replaces all earlier messages
    stored: dict[Tier, list[int]] = {}
    removed: dict[Tier, list[int]] = {}


kv_blocks: Codec[KVBlocks] = Codec(KVBlocks)


class HeldBlocks:
    """Holds the prefixes of one engine. Any message may be lost, repeated, late or a lie."""

    def __init__(self) -> None:
        self.block_size = 0  # 0: nothing is known
        self.num_blocks = 0
        self._keys: dict[Tier, set[int]] = {tier: set() for tier in TIERS}

    def __len__(self) -> int:
        """Return the number of blocks on the device."""
        return len(self._keys["device"])

    def apply(self, change: KVBlocks) -> None:
        if change.is_all or change.block_size != self.block_size:
            self._keys = {tier: set() for tier in TIERS}
        self.block_size, self.num_blocks = change.block_size, change.num_blocks
        for tier, keys in change.removed.items():
            self._keys[tier].difference_update(keys)
        for tier, keys in change.stored.items():
            room = MAX_BLOCKS - sum(map(len, self._keys.values()))
            self._keys[tier].update(keys[: max(0, room)])

    def num_held(self, keys: Sequence[int]) -> int:
        """Return how many blocks of a prompt it has, from the first one on."""
        device, host = self._keys["device"], self._keys["host"]
        if not host:
            return sum(1 for _ in takewhile(device.__contains__, keys))
        return sum(1 for _ in takewhile(lambda key: key in device or key in host, keys))

    def messages(self) -> Iterator[KVBlocks]:
        """Yield all that is held, in the order in which it has to be applied."""
        new = partial(KVBlocks, block_size=self.block_size, num_blocks=self.num_blocks)
        yield new(is_all=True)
        for tier, held in self._keys.items():
            keys = list(held)
            for start in range(0, len(keys), _MAX_KEYS):
                yield new(stored={tier: keys[start : start + _MAX_KEYS]})
