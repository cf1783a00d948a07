"""The attention kernels against float64: by Triton's interpreter on the CPU, and on a GPU as they
are.
"""

from pathlib import Path

import pytest
import torch

from tests.engine.models.attention_reference import Case, make_inputs, reference, relative_error
from tests.interpreter import needs_triton, run_module

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROWS = {
    "decode": ((0, 1), (16, 1), (1500, 1), (77, 1)),
    "fresh": ((0, 130), (0, 17), (0, 64)),
    "mixed": ((500, 1), (3, 1), (0, 60), (200, 70), (64, 100)),
    "long": ((5, 1), (0, 600), (0, 512)),
    "behind": ((1200, 1), (2500, 70), (700, 9), (1300, 130)),
}


@needs_triton
@pytest.mark.processes
def test_kernels_in_the_interpreter() -> None:
    run_module("tests.engine.models.interpreted_attention", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.processes
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """On machines without a GPU; nothing comes from the cache of a run before."""
    run_module("tests.compiled_kernels", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "block_size"),
    [(64, 6, 2, 16), (128, 32, 8, 64), (256, 4, 1, 32), (128, 8, 8, 128), (80, 6, 3, 64)],
)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("has_libraries", [True, False], ids=["libraries", "masks"])
def test_equals_float64_on_a_gpu(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    rows: tuple[tuple[int, int], ...],
    has_libraries: bool,
) -> None:
    from pdlaunch.engine.models.triton_attention import TritonAttention, attend_by_mask

    case = Case(rows, num_heads, num_kv_heads, head_dim, block_size, (None, 100), dtype)
    inputs = make_inputs(case, "cuda")
    for layer in (1, 2):
        kv_cache, expected = reference(inputs, layer, head_dim**-0.5)
        backend = TritonAttention(inputs.layout, inputs.kv_cache)
        if not has_libraries:
            backend.flash, backend._has_cudnn = attend_by_mask, False
        step = backend.prepare(inputs.batch)
        found = step.attend(layer, inputs.query, inputs.key, inputs.value, head_dim**-0.5)
        assert torch.equal(inputs.kv_cache.cpu().nan_to_num(9), kv_cache.nan_to_num(9))
        error = relative_error(found, expected)
        assert error < TOLERANCES[dtype], (layer, error)
