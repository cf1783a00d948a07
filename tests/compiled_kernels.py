"""Compiles the Triton kernels for GPUs that are not there; started by ``test_triton_attention``.

The interpreter shows what kernels compute; this shows
that the compiler takes them, with the arguments that they are launched with, and that they fit.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pdlaunch.engine.models import fused_decoder
from pdlaunch.engine.models.triton_attention import Norm, TritonAttention
from pdlaunch.transfer.integrity.checksum_kernel import constants, hash_pages
from tests.engine.models.attention_reference import Case, make_inputs

SHARED_KIB = {89: 99, 90: 227}
"""Most shared memory of a program, by compute capability. Source: CUDA C++ Programming Guide,
technical specifications.
"""
LAUNCHED = {
    *("attend_decode", "reduce_splits", "gather_kv", "hash_page_head"),
    *("rotate_and_write", "add_and_normalize", "multiply_gated"),
}
MIXED = ((700, 1), (2, 30))
DECODE = ((700, 1),) * 8
LARGEST = (
    Case(MIXED, 8, 2, 128, 64, (None,), torch.float32),
    Case(MIXED, 4, 1, 256, 16, (100,), torch.bfloat16),
)
CASES = (
    Case(MIXED, 32, 8, 128, 16, (None,), torch.bfloat16),
    # Other numbers of splits
    Case(DECODE, 32, 8, 128, 16, (None,), torch.bfloat16),
    # Windows; head_dim 64
    Case(MIXED, 8, 2, 64, 32, (None, 24), torch.float16),
    # head_dim is no power of two
    Case(MIXED, 6, 3, 80, 16, (None,), torch.float16),
    *LARGEST,
)


class NoDevice:
    """Stands for Triton's driver of a GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton caches what it has compiled by device.
        return int(self._target.arch)

    def get_current_stream(self, _device: int) -> int:
        return 0


class Compiler:
    """Compiles in place of each launch."""

    def __init__(self) -> None:
        self.shared_bytes: defaultdict[str, int] = defaultdict(int)
        """By kernel, the most of its programs."""

    def use(self, capability: int) -> None:
        driver.set_active(NoDevice(capability))
        JITFunction.__getitem__ = lambda kernel, grid: self._launch_of(kernel, grid)  # type: ignore[method-assign]

    def _launch_of(self, kernel: Any, grid: Any) -> Any:
        def compile_it(*arguments: Any, **constants: Any) -> None:
            made = kernel.warmup(*arguments, grid=grid, **constants)
            assert made.asm["cubin"]
            most = self.shared_bytes[kernel.__name__]
            self.shared_bytes[kernel.__name__] = max(most, made.metadata.shared)

        return compile_it


def attention(case: Case) -> None:
    """All that attends, with a library that takes gathered keys."""
    inputs = make_inputs(case)
    backend = TritonAttention(inputs.layout, inputs.kv_cache)
    heads = torch.cat([inputs.query, inputs.key, inputs.value]).transpose(0, 1).contiguous()
    rotary = torch.zeros(2, len(heads), case.head_dim, dtype=case.dtype)
    weight = rotary[0, 0]
    backend.flash = lambda query, *_, **__: torch.empty_like(query)
    step = backend.prepare(inputs.batch)
    for layer in range(0, 2 * len(case.windows), 2):
        step.attend(layer, inputs.query, inputs.key, inputs.value, 0.1)
        projected = heads.view(len(heads), -1)
        step.rotate_and_attend(layer, projected, (rotary[0], rotary[1]), 0.1)
        step.rotate_and_attend(layer, projected, None, 0.1, (Norm(weight, 1e-5),) * 2)


def layers(size: int) -> None:
    hidden = torch.zeros(3, size, dtype=torch.bfloat16)
    norm = Norm(hidden[0], 1e-5, 0)
    for first, second in ((None, None), (hidden, None), (hidden, norm)):
        fused_decoder._normalize(first, hidden, norm, second)
    for is_gelu in (False, True):
        fused_decoder._multiply_gated(hidden, is_gelu=is_gelu)


def blocks() -> None:
    words = constants(torch.device("cpu"))
    results = torch.zeros(2, 8, dtype=torch.int64)
    for num_words in (1024, 5 * 20):
        memory = torch.zeros(4, 8, num_words * 8, dtype=torch.uint8)
        hash_pages(memory, torch.tensor([3, 0]), num_words * 8, 0, results, words)


def compile_for(capability: int) -> None:
    compiler = Compiler()
    compiler.use(capability)
    # Where shared memory is small, try only the cases that need the most of it.
    for case in CASES if capability == 90 else LARGEST:
        attention(case)
    for size in (576, 4096):
        layers(size)
    blocks()
    assert compiler.shared_bytes.keys() >= LAUNCHED
    limit = SHARED_KIB[capability] * 1024
    large = {name: most for name, most in compiler.shared_bytes.items() if most > limit}
    assert not large, f"more than {limit} bytes of shared memory: {large}"


if __name__ == "__main__":
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    for capability in SHARED_KIB:
        compile_for(capability)
