"""Engines with several GPUs: CUDA graphs with all-reduce, and pulls between engines of different
TP sizes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.api import complete, total_now
from tests.e2e.conftest import launched
from tests.e2e.tiny_models import make_tokenizer
from tests.e2e.waiting import await_true
from tests.engine.models.tiny import greedy, save_tiny_model

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

NUM_TOKENS = 24


def make_model(folder: Path) -> Path:
    """Make a model with two KV heads, one for each of two ranks."""
    directory = save_tiny_model("llama", folder)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1), (2, 2)])
def test_tokens_are_those_of_one_process(prefill_tp: int, decode_tp: int, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    prompts = [[5 + length % 90] * length for length in (33, 70, 100)]
    expected = greedy(model, prompts, NUM_TOKENS)
    sizes = ["--prefill-tp", str(prefill_tp), "--decode-tp", str(decode_tp)]
    with launched(model, "--device", "cuda", "--kv-cache-memory", "1GiB", *sizes) as deployment:
        url = deployment.url
        for number, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True), start=1):
            assert complete(url, prompt, NUM_TOKENS) == tokens
            await_true(
                lambda number=number: total_now(url, "kv_transfers") >= number,
                "the KV blocks are pulled",
            )
        assert total_now(url, "kv_verification_failures") == 0
