"""Runs the attention and layer kernels in Triton's interpreter; started by
``test_triton_attention``.

A process of its own: the interpreter is switched on by the environment before Triton is imported.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.engine import step_graphs
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.models.attention import Decoder, PackedBatch
from pdlaunch.engine.models.fused_decoder import FusedDecoder, can_fuse
from pdlaunch.engine.models.torch_attention import TorchAttention
from pdlaunch.engine.models.triton_attention import TritonAttention
from pdlaunch.engine.rows import LatestTokens
from pdlaunch.engine.sampler import likeliest_tokens
from tests.engine.models.attention_reference import Case, make_inputs, reference, relative_error
from tests.engine.models.tiny import CONFIGS, loader_of, save_tiny_model

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
"""The interpreter multiplies bfloat16 as if it were integers: that is for the tests on a GPU."""
CASES = (
    Case(((0, 1), (9, 1), (150, 1))),
    Case(((40, 1), (0, 5), (30, 70))),
    Case(((33, 1), (2, 30)), 8, 2, head_dim=128, block_size=32),
    Case(((70, 1), (60, 20)), 2, 1, head_dim=256, block_size=64, dtype=torch.float16),
    Case(((50, 1), (0, 20)), 3, 3, 80, 128, dtype=torch.float16),
    Case(((3, 1), (130, 20)), 2, 1, windows=(None, 60)),
    Case(((0, 150),), 2, 2, head_dim=256, windows=(None, 100)),
    Case(((7, 1), (5, 9)), block_size=4, head_dim=8, windows=(None, 8, 10)),
    Case(((50, 9), (100, 3)), 2, 2, head_dim=80, block_size=8),
)


def check_attention(case: Case) -> None:
    inputs = make_inputs(case)
    scaling = case.head_dim**-0.5
    for layer in (0, 3):
        kv_cache, expected = reference(inputs, layer, scaling)
        step = TritonAttention(inputs.layout, inputs.kv_cache).prepare(inputs.batch)
        found = step.attend(layer, inputs.query, inputs.key, inputs.value, scaling)
        assert torch.equal(inputs.kv_cache.nan_to_num(9), kv_cache.nan_to_num(9)), case
        error = relative_error(found, expected)
        assert error < TOLERANCES[case.dtype], (case, layer, error)


def check_step_graphs() -> None:
    """Decode steps from graphs equal steps without, whichever rows draw; where no graph fits there
    is none.
    """
    # There are no CUDA graphs here: run the step again.
    step_graphs.record = lambda step, _: step  # type: ignore[assignment]
    shape, model = load_tiny("qwen2-window", num_hidden_layers=2)
    groups = make_groups(shape.layer_windows)
    layout = KVCacheLayout(groups, shape.num_kv_heads, shape.head_dim, 4, 4)
    kv_cache = torch.zeros(128, *layout.block_shape())
    decoder, attention = FusedDecoder(model), TritonAttention(layout, kv_cache)
    latest = LatestTokens(shape.vocab_size, 4, torch.device("cpu"))
    latest.keep(torch.tensor([3, 4]))
    shown: list[str] = []

    def batch_of(rows: tuple[tuple[int, int], ...]) -> PackedBatch:
        windows = tuple(group.sliding_window for group in groups)
        batch = make_inputs(Case(rows, block_size=4, windows=windows)).batch
        batch.token_ids[0] = shape.vocab_size + 1  # drawn by the step before
        return batch

    with torch.inference_mode():
        graphs = step_graphs.StepGraphs(
            decoder,
            attention,
            max_rows=4,
            max_blocks=5,
            latest=latest,
            progress=lambda text, _: shown.append(text.removeprefix("capturing CUDA graphs: ")),
        )
        assert shown == ["4 rows", "2 rows", "1 rows"]
        assert not kv_cache.any()
        for rows, kept in ((((5, 1),), [0]), (((3, 1), (6, 1), (18, 1)), [2, 0])):
            batch = batch_of(rows)
            expected = decoder.logits(
                latest.look_up(torch.from_numpy(batch.token_ids)),
                torch.from_numpy(batch.positions),
                torch.tensor(kept, dtype=torch.int64),
                attention.prepare(batch),
            )
            written = kv_cache.clone()
            found = graphs.run(batch, kept)
            assert found is not None, rows
            torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(kv_cache, written, rtol=1e-4, atol=1e-4)
            assert found[1].tolist() == expected.argmax(-1).tolist(), rows
        has_prompt, too_many_rows = ((3, 1), (0, 5)), ((1, 1),) * 5
        for rows in (has_prompt, too_many_rows):
            assert graphs.run(batch_of(rows), []) is None, rows
    for vocab_size in (199, 96, 6400):
        # Of tokens that tie, the first: as argmax has it.
        logits = torch.randint(0, 9, (5, vocab_size)).to(torch.bfloat16)
        assert torch.equal(likeliest_tokens(logits), logits.argmax(-1)), vocab_size


def load_tiny(name: str, **changes: object) -> tuple[ModelShape, Any]:
    """Load a model as on a GPU, in float32."""
    with TemporaryDirectory() as folder, patch.dict(CONFIGS[name], changes):
        loader = loader_of(save_tiny_model(name, Path(folder)))
        return loader.shape, loader.load(stacked=True)


def check_fused_decoder(name: str) -> None:
    """Logits and KV cache of the fused layers equal those of the model's own code over torch's
    operators.
    """
    # One layer of each kind
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3" else {}
    shape, model = load_tiny(name, num_hidden_layers=2, **kinds)
    assert can_fuse(model)
    # Past the windows of 8 and 10, over three blocks, beside a row of one token; each token counts
    # here: the interpreter takes 0.1 s for one in a model.
    case = Case(((0, 1), (0, 2), (0, 12)), block_size=4)
    layout = KVCacheLayout(
        make_groups(shape.layer_windows), shape.num_kv_heads, shape.head_dim, case.block_size, 4
    )
    batch = make_inputs(
        replace(case, windows=tuple(group.sliding_window for group in layout.groups))
    ).batch
    token_ids, positions = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions)
    found = []
    for decoder, backend in ((Decoder, TorchAttention), (FusedDecoder, TritonAttention)):
        kv_cache = torch.zeros(64, *layout.block_shape())
        with torch.inference_mode():
            kept = torch.tensor([0, 2, 14])
            logits = decoder(model).logits(
                token_ids, positions, kept, backend(layout, kv_cache).prepare(batch)
            )
        found.append((logits, kv_cache))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def check_kernels() -> None:
    for case in CASES:
        check_attention(case)


if __name__ == "__main__":
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    check_kernels()
    for model in ("llama-bias", "qwen3", "gemma3"):
        check_fused_decoder(model)
    check_step_graphs()
