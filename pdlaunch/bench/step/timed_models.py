"""The two models that ``pdlaunch bench step`` times: transformers' own, and the engine's runner."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from pdlaunch.config.engine_settings import LoadFormat
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.planning.role_engines import DTypeName
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId

NUM_WARM_UPS = 2


class BareModel:
    """Runs transformers' model with its own attention and cache."""

    def __init__(
        self,
        model_dir: Path,
        shape: ModelShape,
        dtype: DTypeName,
        device: str,
        load_format: LoadFormat,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._shape = shape
        self._dtype = getattr(torch, dtype)
        self._device = torch.device(device)
        if load_format == "dummy":
            with self._device:
                model: Any = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(model_dir), dtype=self._dtype
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=self._dtype, use_safetensors=True
            ).to(self._device)
        self._model = model.eval()

    @torch.inference_mode()
    def time_prefill(self, num_tokens: int, num_steps: int) -> float:
        token_ids = torch.zeros((1, num_tokens), dtype=torch.int64, device=self._device)

        def step() -> None:
            self._model(token_ids, past_key_values=self._new_cache(), logits_to_keep=1).logits[
                :, -1
            ].argmax(-1).tolist()

        return _median_s(step, num_steps)

    @torch.inference_mode()
    def time_decode(self, batch_size: int, context_tokens: int, num_steps: int) -> float:
        cache = self._new_cache()
        size = (batch_size, self._shape.num_kv_heads, context_tokens, self._shape.head_dim)
        for layer in range(self._shape.num_layers):
            keys, values = torch.randn((2, *size), dtype=self._dtype, device=self._device)
            cache.update(keys, values, layer)
        token_ids = torch.zeros((batch_size, 1), dtype=torch.int64, device=self._device)

        def step() -> None:
            self._model(token_ids, past_key_values=cache).logits[:, -1].argmax(-1).tolist()

        return _median_s(step, num_steps)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


class HandDrivenEngine:
    """Runs a ModelRunner, with a scheduler's decisions made by hand."""

    def __init__(self, spec: EngineSpec, decode_reach: int) -> None:
        """``decode_reach``: the tokens of a decode row at the end."""
        self._spec = spec
        self._decode_reach = decode_reach
        self._runner = ModelRunner(spec, tp=None, progress=_ignore_progress)
        self._runner.warm_up()
        self._runner.kv_cache.normal_()

    def time_prefill(self, num_tokens: int, num_steps: int) -> float:
        self._runner.execute(self._admit(1, num_tokens, num_tokens))
        plan = StepPlan(
            step_id=0,
            scheduled=[
                ScheduledRow(row=0, num_computed_tokens=0, num_tokens=num_tokens, sample=True)
            ],
        )
        seconds = _median_s(lambda: self._runner.execute(plan), num_steps)
        self._runner.execute(StepPlan(step_id=0, freed_rows=[0]))
        return seconds

    def time_decode(
        self,
        batch_size: int,
        context_tokens: int,
        num_steps: int,
        chunk: ScheduledRow | None = None,
    ) -> float:
        """Time steps of a batch; ``chunk``, of the row after it, is computed in each."""
        self._runner.execute(self._admit(batch_size, context_tokens + 1, self._decode_reach))
        chunks = []
        if chunk is not None:
            chunks.append(chunk)
            num_tokens = chunk.num_computed_tokens + chunk.num_tokens + 1
            self._runner.execute(self._admit(1, num_tokens, num_tokens, first_row=batch_size))
        computed = iter(range(context_tokens, self._decode_reach))
        launched: deque[LaunchedStep] = deque()

        def step() -> None:
            position = next(computed)
            rows = [
                ScheduledRow(row=row, num_computed_tokens=position, num_tokens=1, sample=True)
                for row in range(batch_size)
            ] + chunks
            launched.append(self._runner.launch(StepPlan(step_id=0, scheduled=rows)))
            if len(launched) > self._spec.async_scheduling:
                self._runner.collect(launched.popleft())

        seconds = _median_s(step, num_steps)
        for left in launched:
            self._runner.collect(left)
        self._runner.execute(StepPlan(step_id=0, freed_rows=[*range(batch_size + len(chunks))]))
        return seconds

    def _admit(
        self, batch_size: int, num_tokens: int, reach: int, *, first_row: int = 0
    ) -> StepPlan:
        """Return a plan that adds rows. Their blocks come after those of ``first_row`` decode rows,
        one row's after the other's.
        """
        num_groups, per_row = len(self._runner.layout.groups), -(-reach // self._spec.block_size)
        before = first_row * num_groups * -(-self._decode_reach // self._spec.block_size)
        sampling = SamplingParams(max_tokens=self._spec.max_model_len, temperature=0.0)
        rows = [
            NewRow(
                row=first_row + row,
                request_id=RequestId(str(first_row + row)),
                token_ids=[0] * num_tokens,
                num_prompt_tokens=num_tokens,
                sampling=sampling,
            )
            for row in range(batch_size)
        ]
        blocks = [
            NewBlocks(
                row=first_row + row,
                group=group,
                first_block_index=0,
                block_ids=[
                    before + (row * num_groups + group) * per_row + index
                    for index in range(per_row)
                ],
            )
            for row in range(batch_size)
            for group in range(num_groups)
        ]
        return StepPlan(step_id=0, new_rows=rows, new_blocks=blocks)


def make_spec(
    model_dir: Path,
    shape: ModelShape,
    *,
    dtype: DTypeName,
    num_threads: int,
    block_size: int,
    device: Literal["cpu", "cuda"],
    max_num_seqs: int,
    decode_reach: int,
    prefill_reach: int,
    chunk_reach: int,
    **settings: Any,
) -> EngineSpec:
    """Return an engine whose KV cache holds one prompt, or all decode rows and a chunk, at their
    ends.
    """
    max_model_len = max(decode_reach, prefill_reach, chunk_reach)
    num_row_blocks = max(
        max_num_seqs * -(-decode_reach // block_size) + -(-chunk_reach // block_size),
        -(-max_model_len // block_size),
    )
    groups = make_groups(shape.layer_windows)
    layout = KVCacheLayout(
        groups, shape.num_kv_heads, shape.head_dim, block_size, DTYPE_BYTES[dtype]
    )
    return EngineSpec(
        name="bench-0",
        role="decode",
        model_dir=str(model_dir),
        served_model_name="bench",
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_memory=num_row_blocks * len(groups) * layout.block_bytes,
        enable_prefix_caching=False,
        enable_cumem_allocator=False,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_model_len,
        device=device,
        device_indices=(0,) if device == "cuda" else (),
        tensor_parallel_size=1,
        num_threads=num_threads,
        **settings,
    )


def _ignore_progress(_text: str, _fraction: float | None) -> None:
    """Show nothing: the command line shows results only."""


def _median_s(step: Callable[[], object], num_steps: int) -> float:
    """Return the median time of ``step``, which ends with token ids on the host: nothing is left
    running on a device.
    """
    for _ in range(NUM_WARM_UPS):
        step()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
