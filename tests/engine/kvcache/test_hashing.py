import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=60)


def reference(root: bytes, token_ids: list[int], block_size: int) -> list[bytes]:
    hashes = []
    for start in range(0, len(token_ids), block_size):
        block = token_ids[start : start + block_size]
        root = hashlib.sha256(
            root + struct.pack(f"<{len(block)}i", *block) + struct.pack("<I", len(block))
        ).digest()
        hashes.append(root)
    return hashes


@given(TOKENS, st.integers(1, 9), st.data())
def test_hashes_do_not_depend_on_how_tokens_arrive(
    token_ids: list[int], block_size: int, data: st.DataObject
) -> None:
    hasher = TokenHasher(root_hash("m"), block_size)
    for end in sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5))):
        hasher.extend(token_ids[:end])
    num_prompt_tokens = data.draw(st.integers(0, len(token_ids)))
    assert hasher.prompt_hashes(token_ids, num_prompt_tokens) == reference(
        root_hash("m"), token_ids[:num_prompt_tokens], block_size
    )
    assert (
        hasher.block_hashes
        == reference(root_hash("m"), token_ids, block_size)[: len(token_ids) // block_size]
    )


def test_root_tells_model_and_salt_apart() -> None:
    roots = [
        root_hash("ab"),
        root_hash("a", cache_salt="b"),
        root_hash("", cache_salt="ab"),
        root_hash("a\0b"),
        root_hash("ab", cache_salt="\ud800"),
    ]
    assert len(set(roots)) == len(roots)


def test_token_ids_beyond_32_bits_are_refused() -> None:
    with pytest.raises(OverflowError):
        TokenHasher(root_hash("m"), 1).extend([2**31])
