"""Times the engine's prefill and decode steps, and those of the same model in bare transformers:
``python -m benchmarks.step --model DIR --batch-sizes 1,32,128 --prefill-tokens 4096``. Prints a
line of JSON for each step.

Both run in this process, one after the other, with the same threads. KV caches hold random numbers,
on which the time of a step does not depend. ``floor_ms`` is the number of bytes that a step must
read, divided by the measured memory bandwidth. A decode step reads the keys and values that its
rows attend to, and all weights once, except a separate embedding table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.find import resolve_model
from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape, read_model_shape
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId

NUM_WARM_UPS = 2


class BareModel:
    """Runs transformers' model with its own attention and cache."""

    def __init__(self, options: argparse.Namespace, shape: ModelShape) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._shape = shape
        self._dtype = getattr(torch, options.dtype)
        self._device = torch.device(options.device)
        if options.dummy:
            with self._device:
                config = AutoConfig.from_pretrained(options.model)
                model: Any = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                options.model, dtype=self._dtype, use_safetensors=True
            ).to(self._device)
        self._model = model.eval()

    @torch.inference_mode()
    def prefill_s(self, num_tokens: int, num_steps: int) -> float:
        token_ids = torch.zeros((1, num_tokens), dtype=torch.int64, device=self._device)

        def step() -> None:
            answer = self._model(token_ids, past_key_values=self._new_cache(), logits_to_keep=1)
            answer.logits[:, -1].argmax(-1).tolist()

        return median_s(step, num_steps)

    @torch.inference_mode()
    def decode_s(self, batch_size: int, context_tokens: int, num_steps: int) -> float:
        cache = self._new_cache()
        size = (batch_size, self._shape.num_kv_heads, context_tokens, self._shape.head_dim)
        for layer in range(self._shape.num_layers):
            keys, values = torch.randn((2, *size), dtype=self._dtype, device=self._device)
            cache.update(keys, values, layer)
        token_ids = torch.zeros((batch_size, 1), dtype=torch.int64, device=self._device)

        def step() -> None:
            self._model(token_ids, past_key_values=cache).logits[:, -1].argmax(-1).tolist()

        return median_s(step, num_steps)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


class HandDrivenEngine:
    """Runs the engine's ``ModelRunner`` with plans made here, without a scheduler."""

    def __init__(self, spec: EngineSpec, decode_reach: int) -> None:
        """``decode_reach``: tokens of a decode row after its last step."""
        self._spec = spec
        self._decode_reach = decode_reach
        self.runner = ModelRunner(spec, tp=None, progress=lambda *_: None)
        self.runner.warm_up()
        self.runner.kv_cache.normal_()

    def prefill_s(self, num_tokens: int, num_steps: int) -> float:
        self.runner.execute(self._admit(1, num_tokens, num_tokens))
        row = ScheduledRow(row=0, num_computed_tokens=0, num_tokens=num_tokens, sample=True)
        plan = StepPlan(step_id=0, scheduled=[row])
        seconds = median_s(lambda: self.runner.execute(plan), num_steps)
        self.runner.execute(StepPlan(step_id=0, freed_rows=[0]))
        return seconds

    def decode_s(self, batch_size: int, context_tokens: int, num_steps: int) -> float:
        """With ``async_scheduling``, each step is launched while the previous step runs."""
        self.runner.execute(self._admit(batch_size, context_tokens + 1, self._decode_reach))
        positions = iter(range(context_tokens, self._decode_reach))
        launched: deque[LaunchedStep] = deque()

        def step() -> None:
            position = next(positions)
            rows = [
                ScheduledRow(row=row, num_computed_tokens=position, num_tokens=1, sample=True)
                for row in range(batch_size)
            ]
            launched.append(self.runner.launch(StepPlan(step_id=0, scheduled=rows)))
            if len(launched) > self._spec.async_scheduling:
                self.runner.collect(launched.popleft())

        seconds = median_s(step, num_steps)
        for left in launched:
            self.runner.collect(left)
        self.runner.execute(StepPlan(step_id=0, freed_rows=[*range(batch_size)]))
        return seconds

    def _admit(self, batch_size: int, num_tokens: int, reach: int) -> StepPlan:
        """Return a plan that adds rows. Each row's blocks follow those of the previous row."""
        num_groups, per_row = len(self.runner.layout.groups), -(-reach // self._spec.block_size)
        sampling = SamplingParams(max_tokens=self._spec.max_model_len, temperature=0.0)
        rows = [
            NewRow(
                row=row,
                request_id=RequestId(str(row)),
                token_ids=[0] * num_tokens,
                num_prompt_tokens=num_tokens,
                sampling=sampling,
            )
            for row in range(batch_size)
        ]
        blocks = [
            NewBlocks(
                row=row,
                group=group,
                first_block_index=0,
                block_ids=[*range(first := (row * num_groups + group) * per_row, first + per_row)],
            )
            for row in range(batch_size)
            for group in range(num_groups)
        ]
        return StepPlan(step_id=0, new_rows=rows, new_blocks=blocks)


def make_spec(
    options: argparse.Namespace, shape: ModelShape, decode_reach: int, max_model_len: int
) -> EngineSpec:
    """Return an engine whose KV cache holds the longest prompt, or all rows at their ends."""
    max_num_seqs, block_size = max(options.batch_sizes), options.block_size
    groups = make_groups(shape.layer_windows)
    layout = KVCacheLayout(
        groups, shape.num_kv_heads, shape.head_dim, block_size, DTYPE_BYTES[options.dtype]
    )
    num_blocks = max(max_num_seqs * -(-decode_reach // block_size), -(-max_model_len // block_size))
    return EngineSpec(
        name="bench-0",
        role="decode",
        model_dir=str(options.model),
        served_model_name="bench",
        load_format="dummy" if options.dummy else "auto",
        dtype=options.dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_memory=num_blocks * len(groups) * layout.block_bytes,
        enable_prefix_caching=False,
        enable_cumem_allocator=False,
        enforce_eager=options.enforce_eager,
        async_scheduling=options.async_scheduling,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_model_len,
        device=options.device,
        device_indices=(0,) if options.device == "cuda" else (),
        tensor_parallel_size=1,
        num_threads=options.num_threads,
    )


def median_s(step: Callable[[], object], num_steps: int) -> float:
    """Return the median time of ``step``, which must end with its results on the host."""
    for _ in range(NUM_WARM_UPS):
        step()
    seconds = []
    for _ in range(num_steps):
        start_at = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start_at)
    return statistics.median(seconds)


def memory_bytes_per_s(device: str, num_bytes: int) -> float:
    """Return the bytes per second of a plain copy or of a sum, whichever is faster."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    half = buffer.numel() // 2

    def copy() -> None:
        buffer[:half].copy_(buffer[half : 2 * half])
        if device == "cuda":
            torch.cuda.synchronize()

    return num_bytes / min(median_s(copy, 9), median_s(lambda: buffer.sum().item(), 9))


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row for each prompt length, then one for each batch size."""
    shape = read_model_shape(options.model)
    torch.set_num_threads(options.num_threads)
    decode_reach = options.context_tokens + options.num_steps + NUM_WARM_UPS + 1
    # A prompt that is computed repeatedly gets one more output token each time.
    prefill_reach = max(*options.prefill_tokens, *options.batch_sizes) + options.num_steps + 3
    rate = memory_bytes_per_s(options.device, options.buffer_bytes)
    bare = None if options.engine_only else BareModel(options, shape)
    bare_s = bare and [
        *(bare.prefill_s(number, options.num_steps) for number in options.prefill_tokens),
        *(
            bare.decode_s(size, options.context_tokens, options.num_steps)
            for size in options.batch_sizes
        ),
    ]
    del bare
    engine = HandDrivenEngine(
        make_spec(options, shape, decode_reach, max(decode_reach, prefill_reach)), decode_reach
    )
    scalar_bytes = DTYPE_BYTES[options.dtype]
    weight_bytes = sum(each.nbytes for each in engine.runner._model.parameters())
    if not shape.tie_word_embeddings:
        weight_bytes -= shape.vocab_size * shape.hidden_size * scalar_bytes
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * scalar_bytes
    context_tokens = options.context_tokens
    seen_tokens = sum(
        context_tokens if window is None else min(context_tokens, window - 1)
        for window in shape.layer_windows
    )
    rows: list[dict[str, object]] = []

    def add(kind: str, size: int, num_tokens: int, engine_s: float, num_bytes: int) -> None:
        beside_s = bare_s and bare_s[len(rows)]
        row = {"kind": kind, "batch_size": size, "num_tokens": num_tokens}
        row |= {"bare_ms": beside_s and round(beside_s * 1e3, 3)}
        row |= {"engine_ms": round(engine_s * 1e3, 3), "floor_ms": round(num_bytes / rate * 1e3, 3)}
        rows.append(row | {"memory_gb_per_s": round(rate / 1e9, 1)})

    for number in options.prefill_tokens:
        seconds = engine.prefill_s(number, options.num_steps)
        add("prefill", 1, number, seconds, weight_bytes + number * shape.num_layers * token_bytes)
    for size in options.batch_sizes:
        seconds = engine.decode_s(size, context_tokens, options.num_steps)
        add(
            "decode", size, context_tokens, seconds, weight_bytes + size * seen_tokens * token_bytes
        )
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="alias or directory")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 16])
    parser.add_argument("--context-tokens", type=int, default=144)
    parser.add_argument("--prefill-tokens", type=numbers, default=[128])
    parser.add_argument("--num-steps", type=int, default=20, help="the median is shown")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--buffer-bytes", type=int, default=512 * 2**20, help="more than caches")
    parser.add_argument("--engine-only", action="store_true", help="without bare transformers")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--async-scheduling", action="store_true", help="launch one step ahead")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        options.model = resolve_model(options.model).cache_dir
    for row in measure(options):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
