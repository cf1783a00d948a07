"""Time the engine's step beside the same model in bare transformers (``pdlaunch bench step``).

Both run in this process, one after the other, with the same threads. KV caches are filled with
random numbers: what a step costs does not depend on them. Beside them stands the memory floor of
the same run (``memory_floor``).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pdlaunch.bench.step.memory_floor import decode_bytes, measure_memory_rate, prefill_bytes
from pdlaunch.config.engine_settings import LoadFormat
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape, read_model_shape
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.errors import ConfigError
from pdlaunch.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId
from pdlaunch.resolve.role_engines import DTypeName

NUM_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Holds the median times of one kind of step."""

    kind: Literal["prefill", "decode"]
    batch_size: int
    num_tokens: int
    """Tokens computed by a prefill step; context of a decode step at its start."""
    bare_s: float
    engine_s: float
    num_bytes: int
    """Bytes that the step must move through memory."""
    memory_bytes_per_s: float
    """Speed of a plain copy or read on this device, before the model was loaded."""

    @property
    def ratio(self) -> float:
        return self.engine_s / self.bare_s

    @property
    def floor_s(self) -> float:
        """Return the time of the memory floor: no step that reads its weights and KV cache can be
        faster.
        """
        return self.num_bytes / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True)
class _Step:
    kind: Literal["prefill", "decode"]
    batch_size: int
    num_tokens: int
    """As that of ``StepTiming``."""

    def num_bytes(self, shape: ModelShape, dtype: DTypeName) -> int:
        """Return the bytes that it must move through memory."""
        if self.kind == "prefill":
            return prefill_bytes(shape, dtype, num_tokens=self.num_tokens)
        return decode_bytes(
            shape, dtype, batch_size=self.batch_size, context_tokens=self.num_tokens
        )

    def time(self, model: _BareModel | _Engine, num_steps: int) -> float:
        """Return the median seconds that ``model`` takes for it."""
        if self.kind == "prefill":
            return model.time_prefill(self.num_tokens, num_steps)
        return model.time_decode(self.batch_size, self.num_tokens, num_steps)


def bench_step(
    model_dir: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    context_tokens: int = 128,
    num_steps: int = 20,
    prefill_tokens: int | Sequence[int] = 128,
    dtype: DTypeName = "float32",
    num_threads: int = 1,
    block_size: int = 16,
    device: Literal["cpu", "cuda"] = "cpu",
    load_format: LoadFormat = "auto",
    buffer_bytes: int | None = None,
    **engine_settings: object,
) -> list[StepTiming]:
    """Time the prefill of one prompt of each length, then decode steps at each batch size; greedy.

    ``load_format`` dummy needs only config.json. ``buffer_bytes``: with which the speed of memory
    is measured, by default more than caches hold. ``engine_settings``: of the engine alone; with
    ``async_scheduling`` its decode steps are launched while the one before runs, and timed from
    one's tokens to the next one's. Raises ConfigError as ``ModelRunner`` does, and when the device
    is not there or a context is longer than the model's.
    """
    shape = read_model_shape(model_dir)
    if load_format != "dummy":
        # transformers would open pickles too.
        weight_files(Path(model_dir))
    torch.set_num_threads(num_threads)
    lengths = [prefill_tokens] if isinstance(prefill_tokens, int) else prefill_tokens
    _check(shape, device, max(*lengths, context_tokens + NUM_WARM_UPS + num_steps))
    memory_rate = measure_memory_rate(torch.device(device), buffer_bytes)
    if device == "cuda":
        torch.cuda.empty_cache()
    steps = [
        *(_Step("prefill", 1, num_tokens) for num_tokens in lengths),
        *(_Step("decode", batch_size, context_tokens) for batch_size in batch_sizes),
    ]
    bare = _BareModel(Path(model_dir), shape, dtype, device, load_format)
    bare_s = [step.time(bare, num_steps) for step in steps]
    del bare
    decode_reach = context_tokens + num_steps + NUM_WARM_UPS + 1
    spec = _make_spec(
        Path(model_dir),
        shape,
        dtype=dtype,
        num_threads=num_threads,
        block_size=block_size,
        device=device,
        max_num_seqs=max(batch_sizes),
        decode_reach=decode_reach,
        # A prompt that is computed again and again gets one more output token each time.
        prefill_reach=max(lengths) + num_steps + NUM_WARM_UPS + 1,
        load_format=load_format,
        **engine_settings,
    )
    engine = _Engine(spec, decode_reach)
    engine_s = [step.time(engine, num_steps) for step in steps]
    return [
        StepTiming(
            step.kind,
            step.batch_size,
            step.num_tokens,
            bare_step_s,
            engine_step_s,
            step.num_bytes(shape, dtype),
            memory_rate,
        )
        for step, bare_step_s, engine_step_s in zip(steps, bare_s, engine_s, strict=True)
    ]


def _check(shape: ModelShape, device: str, num_tokens: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: torch finds no CUDA device here",
            field="device",
            value=device,
            fix="Take --device cpu.",
        )
    if num_tokens > shape.max_position_embeddings:
        raise ConfigError(
            (
                f"the steps reach {num_tokens} tokens, but the model takes "
                f"{shape.max_position_embeddings} (max_position_embeddings)"
            ),
            field="context_tokens",
            value=num_tokens,
            fix="Take fewer --context-tokens, --prefill-tokens or --num-steps.",
        )


class _BareModel:
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


class _Engine:
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

    def time_decode(self, batch_size: int, context_tokens: int, num_steps: int) -> float:
        self._runner.execute(self._admit(batch_size, context_tokens + 1, self._decode_reach))
        computed = iter(range(context_tokens, self._decode_reach))
        launched: deque[LaunchedStep] = deque()

        def step() -> None:
            position = next(computed)
            rows = [
                ScheduledRow(row=row, num_computed_tokens=position, num_tokens=1, sample=True)
                for row in range(batch_size)
            ]
            launched.append(self._runner.launch(StepPlan(step_id=0, scheduled=rows)))
            if len(launched) > self._spec.async_scheduling:
                self._runner.collect(launched.popleft())

        seconds = _median_s(step, num_steps)
        for left in launched:
            self._runner.collect(left)
        self._runner.execute(StepPlan(step_id=0, freed_rows=[*range(batch_size)]))
        return seconds

    def _admit(self, batch_size: int, num_tokens: int, reach: int) -> StepPlan:
        num_groups, per_row = len(self._runner.layout.groups), -(-reach // self._spec.block_size)
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
                block_ids=[
                    (row * num_groups + group) * per_row + index for index in range(per_row)
                ],
            )
            for row in range(batch_size)
            for group in range(num_groups)
        ]
        return StepPlan(step_id=0, new_rows=rows, new_blocks=blocks)


def _make_spec(
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
    **settings: Any,
) -> EngineSpec:
    """Return an engine whose KV cache holds one prompt, and all decode rows, at their ends."""
    max_model_len = max(decode_reach, prefill_reach)
    num_row_blocks = max(
        max_num_seqs * -(-decode_reach // block_size), -(-max_model_len // block_size)
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


def row_figures(timing: StepTiming) -> dict[str, object]:
    """Return a timing as a row of JSON: milliseconds, megabytes, shares."""
    return {
        "kind": timing.kind,
        "batch_size": timing.batch_size,
        "num_tokens": timing.num_tokens,
        "bare_ms": round(timing.bare_s * 1000, 2),
        "engine_ms": round(timing.engine_s * 1000, 2),
        "ratio": round(timing.ratio, 3),
        "floor_ms": round(timing.floor_s * 1000, 3),
        "floor_ratio": round(timing.engine_s / timing.floor_s, 3),
        "moved_megabytes": round(timing.num_bytes / 1e6, 3),
        "memory_gb_per_s": round(timing.memory_bytes_per_s / 1e9, 2),
    }
