"""Time the engine's step beside the same model in bare transformers (``pdlaunch bench step``).

Both run in this process, one after the other, with the same threads. KV caches are filled with
random numbers: what a step costs does not depend on them. Beside them stands the memory floor of
the same run (``memory_floor``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pdlaunch.bench.step.memory_floor import decode_bytes, measure_memory_rate, prefill_bytes
from pdlaunch.bench.step.timed_models import NUM_WARM_UPS, BareModel, HandDrivenEngine, make_spec
from pdlaunch.config.engine_settings import LoadFormat
from pdlaunch.config.model_files.shape import ModelShape, read_model_shape
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.engine.step import ScheduledRow
from pdlaunch.errors import ConfigError
from pdlaunch.planning.role_engines import DTypeName

StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Holds the median times of one kind of step."""

    kind: StepKind
    batch_size: int
    num_tokens: int
    """Tokens of the prompt that a prefill or mixed step computes; context of a decode step at its
    start.
    """
    bare_s: float | None
    """None: transformers computes no prompts beside a batch."""
    engine_s: float
    num_bytes: int
    """Bytes that the step must move through memory."""
    memory_bytes_per_s: float
    """Speed of a plain copy or read on this device, before the model was loaded."""

    @property
    def ratio(self) -> float | None:
        return None if self.bare_s is None else self.engine_s / self.bare_s

    @property
    def floor_s(self) -> float:
        """Return the time of the memory floor: no step that reads its weights and KV cache can be
        faster.
        """
        return self.num_bytes / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True)
class _Step:
    kind: StepKind
    batch_size: int
    num_tokens: int
    """As that of ``StepTiming``."""
    context_tokens: int = 0
    """Tokens before the step in each row of the batch, beside which a chunk is computed."""
    chunk_behind: int = 0

    def num_bytes(self, shape: ModelShape, dtype: DTypeName) -> int:
        """Return the bytes that it must move through memory; of a chunk, those of the batch."""
        if self.kind == "prefill":
            return prefill_bytes(shape, dtype, num_tokens=self.num_tokens)
        context_tokens = self.num_tokens if self.kind == "decode" else self.context_tokens
        return decode_bytes(shape, dtype, batch_size=self.batch_size, context_tokens=context_tokens)

    def time_bare(self, model: BareModel, num_steps: int) -> float | None:
        """Return the median seconds that ``model`` takes for it."""
        if self.kind == "mixed":
            return None
        if self.kind == "prefill":
            return model.time_prefill(self.num_tokens, num_steps)
        return model.time_decode(self.batch_size, self.num_tokens, num_steps)

    def time(self, engine: HandDrivenEngine, num_steps: int) -> float:
        """Return the median seconds that ``engine`` takes for it."""
        if self.kind == "prefill":
            return engine.time_prefill(self.num_tokens, num_steps)
        if self.kind == "decode":
            return engine.time_decode(self.batch_size, self.num_tokens, num_steps)
        chunk = ScheduledRow(
            row=self.batch_size,
            num_computed_tokens=self.chunk_behind,
            num_tokens=self.num_tokens,
            sample=False,
        )
        return engine.time_decode(self.batch_size, self.context_tokens, num_steps, chunk)


def bench_step(
    model_dir: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    context_tokens: int = 128,
    num_steps: int = 20,
    prefill_tokens: int | Sequence[int] = 128,
    chunk_tokens: Sequence[int] = (),
    chunk_behind: int = 0,
    dtype: DTypeName = "float32",
    num_threads: int = 1,
    block_size: int = 16,
    device: Literal["cpu", "cuda"] = "cpu",
    load_format: LoadFormat = "auto",
    buffer_bytes: int | None = None,
    **engine_settings: object,
) -> list[StepTiming]:
    """Time the prefill of one prompt of each length, decode steps at each batch size, and the same
    with a chunk of a prompt beside it, of each of ``chunk_tokens``, behind ``chunk_behind`` others;
    greedy.

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
    longest_chunk = max(chunk_tokens, default=0)
    decode_reach = context_tokens + num_steps + NUM_WARM_UPS + 1
    _check(shape, device, max(*lengths, decode_reach - 1, chunk_behind + longest_chunk))
    memory_rate = measure_memory_rate(torch.device(device), buffer_bytes)
    if device == "cuda":
        torch.cuda.empty_cache()
    steps = [
        *(_Step("prefill", 1, num_tokens) for num_tokens in lengths),
        *(_Step("decode", batch_size, context_tokens) for batch_size in batch_sizes),
        *(
            _Step("mixed", batch_size, num_tokens, context_tokens, chunk_behind)
            for batch_size in batch_sizes
            for num_tokens in chunk_tokens
        ),
    ]
    bare = BareModel(Path(model_dir), shape, dtype, device, load_format)
    bare_s = [step.time_bare(bare, num_steps) for step in steps]
    del bare
    spec = make_spec(
        Path(model_dir),
        shape,
        dtype=dtype,
        num_threads=num_threads,
        block_size=block_size,
        device=device,
        max_num_seqs=max(batch_sizes) + bool(chunk_tokens),
        decode_reach=decode_reach,
        chunk_reach=chunk_behind + longest_chunk + 1,
        # A prompt that is computed again and again gets one more output token each time.
        prefill_reach=max(*lengths, max(batch_sizes) + longest_chunk)
        + num_steps
        + NUM_WARM_UPS
        + 1,
        load_format=load_format,
        **engine_settings,
    )
    engine = HandDrivenEngine(spec, decode_reach)
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
            fix="Take fewer --context-tokens, --prefill-tokens, --chunk-behind or --num-steps.",
        )


def row_figures(timing: StepTiming) -> dict[str, object]:
    """Return a timing as a row of JSON: milliseconds, megabytes, shares."""
    return {
        "kind": timing.kind,
        "batch_size": timing.batch_size,
        "num_tokens": timing.num_tokens,
        "bare_ms": None if timing.bare_s is None else round(timing.bare_s * 1000, 2),
        "engine_ms": round(timing.engine_s * 1000, 2),
        "ratio": None if timing.ratio is None else round(timing.ratio, 3),
        "floor_ms": round(timing.floor_s * 1000, 3),
        "floor_ratio": round(timing.engine_s / timing.floor_s, 3),
        "moved_megabytes": round(timing.num_bytes / 1e6, 3),
        "memory_gb_per_s": round(timing.memory_bytes_per_s / 1e9, 2),
    }
