"""64-bit keys of prefixes, which engines report to routers.

    k[-1] = XXH3(LoRA adapter, cache_salt)
    k[i]  = XXH3(tokens of block i as int32 little endian, seed k[i-1])

A key is only a hint: after a collision the router may choose a worse engine. Engines find their own
blocks by the hashes of ``hashing.py``.
"""

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Literal

import xxhash

Tier = Literal["device", "host"]
TIERS: tuple[Tier, ...] = ("device", "host")
Keys = dict[Tier, list[int]]


def root_key(*, adapter: str = "", cache_salt: str = "") -> int:
    """Return k[-1]."""
    text = f"{len(adapter)} {adapter}{cache_salt}"
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def as_bytes(token_ids: Sequence[int]) -> bytes:
    """Return token ids as the bytes to hash."""
    return array("i", token_ids).tobytes()


def next_keys(parent: int, tokens: bytes, block_size: int) -> list[int]:
    """Return the keys of the full blocks in ``tokens``; ``parent``: the key of their prefix."""
    digest, whole = xxhash.xxh3_64_intdigest, len(tokens) - len(tokens) % (4 * block_size)
    blocks = struct.iter_unpack(f"{4 * block_size}s", memoryview(tokens)[:whole])
    return [parent := digest(block, parent) for (block,) in blocks]


class PrefixKeys:
    """Holds the keys of one request's full blocks, and grows with the request."""

    __slots__ = ("_block_size", "_root", "keys")

    def __init__(self, root: int, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self.keys: list[int] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> None:
        parent = self.keys[-1] if self.keys else self._root
        tokens = token_ids[len(self.keys) * self._block_size : num_blocks * self._block_size]
        self.keys += next_keys(parent, as_bytes(tokens), self._block_size)


class PrefixChanges:
    """Collects which prefixes each tier of the cache gains and loses. A host block gets the key of
    the device block from which it was copied.
    """

    def __init__(self) -> None:
        # Block hash -> key, of the blocks that are being registered.
        self.names: Mapping[bytes, int] = {}
        self._held: dict[Tier, dict[bytes, int]] = {tier: {} for tier in TIERS}
        self._changes: dict[Tier, dict[int, bool]] = {tier: {} for tier in TIERS}

    def note(self, tier: Tier, block_hash: bytes, is_held: bool) -> None:
        held = self._held[tier]
        if is_held:
            key = self.names.get(block_hash)
            key = self.find(block_hash) if key is None else key
            if key is None:
                return
            held[block_hash] = key
        elif (key := held.pop(block_hash, None)) is None:
            return
        self._changes[tier][key] = is_held

    def find(self, block_hash: bytes) -> int | None:
        return next((keys[block_hash] for keys in self._held.values() if block_hash in keys), None)

    def take(self) -> tuple[Keys, Keys] | None:
        """Return the keys stored and the keys removed since the last call; no key is in both."""
        if not any(self._changes.values()):
            return None
        changes, self._changes = self._changes, {tier: {} for tier in TIERS}
        stored, removed = (
            {
                tier: [key for key, is_held in keys.items() if is_held is wanted]
                for tier, keys in changes.items()
            }
            for wanted in (True, False)
        )
        return stored, removed

    def held(self) -> Keys:
        """Return the keys of each tier, and discard the changes so far."""
        self.take()
        return {tier: list(keys.values()) for tier, keys in self._held.items()}
