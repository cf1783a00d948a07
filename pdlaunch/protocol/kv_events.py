"""Lists the prefixes that an engine caches: sent by rank 0 to its server, then to routers."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Annotated

import msgspec

from pdlaunch.engine.kvcache.prefix_keys import TIERS, Tier
from pdlaunch.protocol.wire import Codec, Message

# Most blocks remembered for one rank, 83 bytes each; further blocks are dropped. An honest
# rank reports more only with a cache of more than 16 million tokens.
MAX_BLOCKS = 1_000_000
# Most keys in a message, so that no message occupies an event loop for more than 5 ms.
_MAX_KEYS = 32_768


class KVBlocks(Message):
    """Keys of the prefixes that an engine has stored or removed; a key stands for one block."""

    block_size: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # tokens
    dp_rank: Annotated[int, msgspec.Meta(ge=0, lt=64)] = 0  # data parallel rank that has the blocks
    # capacity of the device's cache, in blocks of ``block_size`` tokens; 0: not known
    num_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    is_all: bool = False  # replaces all earlier messages of the rank
    stored: dict[Tier, list[int]] = {}
    removed: dict[Tier, list[int]] = {}


kv_blocks: Codec[KVBlocks] = Codec(KVBlocks)


class HeldBlocks:
    """Holds the prefixes of one data parallel rank. Any message may be lost, late or false."""

    def __init__(self, dp_rank: int = 0) -> None:
        self.dp_rank = dp_rank
        self.block_size = 0  # 0: nothing is known
        self.num_blocks = 0
        self.num_new = 0  # recently stored blocks on the device, see ``KVIndex.age``
        self._keys: dict[Tier, set[int]] = {tier: set() for tier in TIERS}

    def __len__(self) -> int:
        return len(self._keys["device"])

    def apply(self, change: KVBlocks) -> None:
        if change.is_all or change.block_size != self.block_size:
            self._keys, self.num_new = {tier: set() for tier in TIERS}, 0
        self.block_size, self.num_blocks = change.block_size, change.num_blocks
        self.num_new += len(change.stored.get("device", ()))
        for tier, keys in change.removed.items():
            self._keys[tier].difference_update(keys)
        for tier, keys in change.stored.items():
            room = MAX_BLOCKS - sum(map(len, self._keys.values()))
            self._keys[tier].update(keys[: max(0, room)])

    def num_held(self, keys: Sequence[int]) -> int:
        device, host = self._keys["device"], self._keys["host"]
        if not host:
            return sum(1 for _ in takewhile(device.__contains__, keys))
        return sum(1 for _ in takewhile(lambda key: key in device or key in host, keys))

    def messages(self) -> Iterator[KVBlocks]:
        """Yield messages that reproduce this state when they are applied in order."""
        new = partial(
            KVBlocks, block_size=self.block_size, num_blocks=self.num_blocks, dp_rank=self.dp_rank
        )
        yield new(is_all=True)
        for tier, held in self._keys.items():
            keys = list(held)
            for start in range(0, len(keys), _MAX_KEYS):
                yield new(stored={tier: keys[start : start + _MAX_KEYS]})
