"""Chained hashes of a request's token blocks: keys of the prefix cache, and proof of a pull.

    h[-1] = H(model content, cache_salt)
    h[i]  = H(h[i-1], tokens of block i as int32 little endian, number of tokens)

So equal hashes mean the same model, salt and tokens from the first token on. H is SHA-256.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

_FORMAT = b"pdlaunch kv block hash 2"


def root_hash(model_digest: str, *, cache_salt: str = "") -> bytes:
    """Return h[-1]. The lengths are hashed, too, so that no two pairs share a hash."""
    digest = sha256(_FORMAT)
    for part in (model_digest, cache_salt):
        # A salt is any text, even one with lone surrogates.
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class TokenHasher:
    """Hashes the full blocks of one request, each block once, as the request grows."""

    __slots__ = ("_block_size", "_root", "block_hashes")

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self.block_hashes: list[bytes] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        start = len(self.block_hashes) * self._block_size
        num_blocks = (len(token_ids) - start) // self._block_size
        if num_blocks > 0:
            end = start + num_blocks * self._block_size
            parent = self.block_hashes[-1] if self.block_hashes else self._root
            self.block_hashes += _chain(parent, token_ids[start:end], self._block_size)

    def prompt_hashes(self, token_ids: Sequence[int], num_prompt_tokens: int) -> list[bytes]:
        """Return the hashes of all blocks of the prompt; the last block may be partial."""
        self.extend(token_ids)
        num_full_blocks = num_prompt_tokens // self._block_size
        hashes = self.block_hashes[:num_full_blocks]
        tail = token_ids[num_full_blocks * self._block_size : num_prompt_tokens]
        if tail:
            # The length is hashed, too, so that a partial block never equals a full block.
            hashes += _chain(hashes[-1] if hashes else self._root, tail, len(tail))
        return hashes


def _chain(parent: bytes, token_ids: Sequence[int], num_tokens: int) -> list[bytes]:
    data = array("i", token_ids).tobytes()  # little endian on all supported machines
    length = num_tokens.to_bytes(4, "little")
    hashes = []
    for start in range(0, len(data), num_tokens * 4):
        parent = sha256(parent + data[start : start + num_tokens * 4] + length).digest()
        hashes.append(parent)
    return hashes
