"""Checks the hasher of devices; run as a program, by Triton's interpreter on the CPU."""

import numpy as np
import torch
import xxhash

from pdlaunch.vllm.proof import CudaHasher, _blake3, _regions

SHAPE = (6, 2, 8, 16)  # blocks, heads, tokens of a block, content: 512 bytes a head in float32


def check(device: str) -> None:
    torch.manual_seed(0)
    layers = [torch.randn(SHAPE, device=device) for _ in range(2)]
    hasher = CudaHasher([_regions(layer) for layer in layers])
    before = hasher.checksums([4, 1])
    expected = [
        [
            int.from_bytes(
                _blake3(
                    xxhash.xxh3_64_intdigest(layer[block, head].cpu().numpy()).to_bytes(8, "little")
                    for layer in layers
                ),
                "little",
            )
            for head in range(2)
        ]
        for block in (4, 1)
    ]
    assert before.tolist() == expected
    for layer in layers:
        layer[1, 1].view(torch.int32)[7, 15] ^= 1 << 30
        changed = hasher.checksums([4, 1]) != before
        assert changed.tolist() == [[False, False], [False, True]]
        layer[1, 1].view(torch.int32)[7, 15] ^= 1 << 30
    assert np.array_equal(hasher.checksums([4, 1]), before)
    assert hasher.checksums([]).shape == (0, 2)


if __name__ == "__main__":
    check("cpu")
