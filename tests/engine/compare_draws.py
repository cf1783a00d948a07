"""How often a seeded draw differs because another batch shape has rounded the logits differently,
by two ways of drawing.

``python -m tests.engine.compare_draws MODEL_DIR``: takes minutes; the table is in
docs/reliability.md. Draws by noise, as the engine does, and by the inverse of the cumulative
distribution in the order of the vocabulary, with the same number of seeds.
"""

from __future__ import annotations

import random
import sys
from typing import Any
from unittest.mock import patch

import torch

from pdlaunch.engine import sampler
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.sampler import SampleRow
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.hand_scheduler import HandScheduler, Request, ignore_progress, make_spec

NUM_SEEDS = 4096
ROWS_AT_ONCE = 64
SHAPES = {"alone": (1, 96), "6 in a batch": (6, 96), "3 in a batch, chunks of 7": (3, 7)}
"""Prompts at once, tokens of a chunk."""
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 50},
    {"min_p": 0.05},
]

Contexts = dict[tuple[int, ...], torch.Tensor]


def contexts_of(runner: ModelRunner, num_prompts: int, chunk: int) -> Contexts:
    """The logits after each context that a shape computes, by its tokens."""
    found: Contexts = {}
    draw_tokens = sampler.draw_tokens

    def remember(
        logits: torch.Tensor, rows: list[SampleRow], likeliest: torch.Tensor | None = None
    ) -> sampler.DrawnTokens:
        found.update(
            (tuple(row.token_ids.tolist()), values.clone())
            for row, values in zip(rows, logits.float(), strict=True)
        )
        return draw_tokens(logits, rows, likeliest)

    source = random.Random(3)
    prompts = [
        [source.randrange(3, runner.shape.vocab_size) for _ in range(source.randrange(8, 80))]
        for _ in range(6)
    ]
    params = [SamplingParams(max_tokens=4, seed=seed, top_p=0.9) for seed in range(len(prompts))]
    requests = [
        Request(prompt, 4, sampling, 0, chunk)
        for prompt, sampling in zip(prompts, params, strict=True)
    ]
    with patch("pdlaunch.engine.runner.draw_tokens", remember):
        for start in range(0, len(requests), num_prompts):
            HandScheduler(runner).run(requests[start : start + num_prompts])
    return found


def scaled(logits: torch.Tensor, kind: dict[str, Any]) -> torch.Tensor:
    """[1, vocab_size]: what is drawn from."""
    sampling = SamplingParams(max_tokens=1, **kind)
    row = SampleRow(sampling, torch.tensor([0]).numpy(), 1, None)
    values = ((logits - logits.max()) / row.temperature)[None]
    return sampler.cut_unlikely(values, [row])


def by_noise(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [
            sampler.draw_by_noise(values.expand(len(part), -1), part)
            for part in keys.split(ROWS_AT_ONCE)
        ]
    )


def by_inverse(values: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulated = values.softmax(-1).cumsum(-1, dtype=torch.float64)[0]
    return torch.searchsorted(cumulated, uniforms * cumulated[-1], right=True)


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(model_dir: str) -> None:
    torch.set_num_threads(1)
    spec = make_spec(model_dir, kv_cache_memory=2**28, max_num_batched_tokens=512)
    runner = ModelRunner(spec, tp=None, progress=ignore_progress)
    shapes = {name: contexts_of(runner, *shape) for name, shape in SHAPES.items()}
    alone = shapes.pop("alone")
    source = torch.Generator().manual_seed(5)
    keys = torch.randint(-(2**63), 2**63 - 1, (NUM_SEEDS,), generator=source)
    uniforms = torch.rand(NUM_SEEDS, dtype=torch.float64, generator=source)
    tell(
        "| parameters | beside each alone | logits differ by up to | inverse, of a million | "
        "noise, of a million |"
    )
    tell("|---|---|---|---|---|")
    for kind in KINDS:
        for name, contexts in shapes.items():
            both = sorted(alone.keys() & contexts.keys())
            rounding = max(
                float((alone[context] - contexts[context]).abs().max()) for context in both
            )
            moved = [0, 0]
            for context in both:
                pair = [scaled(logits[context], kind) for logits in (alone, contexts)]
                for way, draws in enumerate(
                    ([by_inverse(v, uniforms) for v in pair], [by_noise(v, keys) for v in pair])
                ):
                    moved[way] += int((draws[0] != draws[1]).sum())
            shares = [f"{1e6 * number / (len(both) * NUM_SEEDS):,.0f}" for number in moved]
            tell(f"| {kind or 'none'} | {name} | {rounding:.1e} | {shares[0]} | {shares[1]} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
