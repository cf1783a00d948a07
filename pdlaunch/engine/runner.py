"""Runs the model of one rank: takes a StepPlan, computes KV blocks and logits, draws tokens.

``launch`` does ``apply -> pack -> attend -> sample``; ``collect`` returns the tokens later. The
scheduler decides on rows, blocks and tokens.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import DTYPE_BYTES, read_model_shape
from pdlaunch.config.model_files.weights import model_digest, refuse_changes, weight_digests
from pdlaunch.engine.grammar import Grammars
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.memory.pools import (
    KV_CACHE,
    TAGS,
    WEIGHTS,
    MemoryPools,
    open_kv_memory,
    open_memory_pools,
)
from pdlaunch.engine.models.attention import AttentionBackend, Decoder, PackedBatch, ReportProgress
from pdlaunch.engine.models.loader import ModelLoader
from pdlaunch.engine.models.step_inputs import Download, upload_array
from pdlaunch.engine.models.tensor_parallel import Shard, TPGroup
from pdlaunch.engine.models.torch_attention import TorchAttention
from pdlaunch.engine.rows import LatestTokens, Row, RowTable
from pdlaunch.engine.sampler import DrawnTokens, draw_tokens
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.engine.step_graphs import StepGraphs
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.kv_params import TokenOutput

# Largest share of a GPU that is kept free for CUDA contexts, libraries and graphs
_MOST_SPARED = 0.05
_NUM_WARM_UP_STREAMS = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """Holds what ``collect`` needs of a launched step."""

    drawn: DrawnTokens | None = None  # None if this rank draws no token
    # Row and position of each drawn token; the rows are kept until the step has been collected
    places: list[tuple[Row, int]] = field(default_factory=list)
    # Signals the end of a step that draws no token here; until then, it uses its blocks
    ended: Download | None = None
    # Tokens of prompts, with their log-probabilities
    scored: DrawnTokens | None = None


class ModelRunner:
    """Owns the model and the KV cache of one rank. Not safe for more than one thread. Every block
    of ``kv_cache``, [num_blocks, *layout.block_shape()], may be used.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        tp: TPGroup | None,
        progress: ReportProgress,
        pools: MemoryPools | None = None,
        pinned: Mapping[str, str] | None = None,
    ) -> None:
        """``pools``: where weights and KV cache are allocated; None opens those of ``spec``.
        ``pinned``: the digests that ``model_files`` must have. Raises ConfigError,
        UnsupportedModelError.
        """
        self._spec = spec
        self._tp = tp
        self._progress = progress
        self._tp_rank = 0 if tp is None else tp.tp_rank
        model_dir = Path(spec.model_dir)
        # Taken before the first read and compared after the last one, to detect changed files.
        self.model_files = self._digests()
        refuse_changes(pinned or self.model_files, self.model_files)
        self.shape = read_model_shape(model_dir)
        self._device = self._open_device()
        shard = Shard(self._tp_rank, 1 if tp is None else tp.tp_size, self.shape)
        self.first_kv_head = shard.first_kv_head
        self.num_heads = shard.num_attention_heads
        self.layout = KVCacheLayout(
            groups=make_groups(self.shape.layer_windows),
            num_kv_heads=shard.num_kv_heads,
            head_dim=self.shape.head_dim,
            block_size=spec.block_size,
            dtype_bytes=DTYPE_BYTES[spec.dtype],
        )
        is_dummy = spec.load_format == "dummy"
        dtype = getattr(torch, spec.dtype)
        self._pools = pools or open_memory_pools(
            enabled=spec.enable_cumem_allocator, device=self._device
        )
        self._loader = ModelLoader(
            model_dir, self.shape, dtype, self._device, dummy=is_dummy, tp=tp, progress=progress
        )
        with self._pools.memory_pool(WEIGHTS):
            self._model = self._loader.load(stacked=self._device.type == "cuda")
            self._decoder = self._new_decoder()
        refuse_changes(self.model_files, self._digests(), "while it was loaded")
        self.model_digest = model_digest(self.model_files)
        self._weights_lost = False
        progress("allocating the KV cache", None)
        self.num_blocks = count_kv_blocks(spec, self.layout, self._device, tp)
        self.kv_memory = open_kv_memory(
            self._pools,
            self._device,
            shared=spec.has_peers and spec.kv_transfer.connector_section.maps_memory,
            mapped_alone=spec.has_peers and spec.kv_transfer.connector_section.only_maps_memory,
        )
        content = self.kv_memory.zeros(self.num_blocks * self.layout.block_bytes)
        self.kv_cache = content.view(dtype).view(self.num_blocks, *self.layout.block_shape())
        self._latest = (
            LatestTokens(self.shape.vocab_size, spec.max_num_seqs, self._device)
            if spec.async_scheduling
            else None
        )
        self._attention = self._new_attention()
        self._graphs: StepGraphs | None = None
        self._rows = RowTable(self._spec, len(self.layout.groups))
        self.grammars = Grammars(model_dir, self.shape.vocab_size, self.shape.eos_token_ids)

    def execute(self, plan: StepPlan) -> list[TokenOutput | None]:
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Launch a step after the previous one. On a CPU, it has ended when this returns."""
        self._rows.apply(plan)
        if not plan.scheduled:
            return LaunchedStep()
        if not self._attention.reads_only_context:
            self._rows.clean(plan.scheduled, self.kv_cache)
        # Decode rows first, as backends need them. The sort is stable.
        packed = sorted(plan.scheduled, key=lambda item: item.num_tokens != 1)
        batch = self._rows.pack(packed)
        ends = dict(zip([item.row for item in packed], batch.row_starts[1:].tolist(), strict=True))
        sampled = [item.row for item in plan.scheduled if item.sample]
        rows = [self._rows[row] for row in sampled]
        # Every rank has the whole output layer; rank 0 draws for all.
        draws = bool(sampled) and self._tp_rank == 0
        scoring = [item for item in plan.scheduled if item.num_scored and self._tp_rank == 0]
        # Indices of tokens in the batch, in the order of the plan: the scored tokens, then the last
        # token of each row that draws.
        kept = [
            ends[item.row] - item.num_tokens + index
            for item in scoring
            for index in range(item.num_scored)
        ]
        num_scored = len(kept)
        kept += [ends[row] - 1 for row in sampled] if draws else []
        logits, likeliest = self._forward(batch, kept)
        scored = self._score(scoring, logits[:num_scored]) if scoring else None
        if scoring:
            logits, likeliest = logits[num_scored:], None
        if draws and self.grammars.mask(logits, rows):
            likeliest = None
        drawn = draw_tokens(logits, rows, likeliest) if draws else None
        if self._latest is not None and sampled:
            if drawn is None:
                token_ids = torch.empty(len(sampled), dtype=torch.int64, device=self._device)
            else:
                token_ids = drawn.token_ids
            self._latest.keep(token_ids if self._tp is None else self._tp.broadcast(token_ids))
        places = []
        if drawn is not None or self._latest is not None:
            # Until a token is known, its number in ``LatestTokens`` is the placeholder.
            first = self.shape.vocab_size
            places = [(row, row.expect(number)) for number, row in enumerate(rows, first)]
        ended = Download([], self._device) if drawn is None else None
        return LaunchedStep(drawn, places, ended, scored)

    def _score(self, scoring: list[ScheduledRow], logits: torch.Tensor) -> DrawnTokens:
        """Compute the log-probability of the known token after each scored token."""
        next_ids, num_tops = [], []
        for item in scoring:
            row, begin = self._rows[item.row], item.num_computed_tokens + 1
            next_ids.append(row.token_ids[begin : begin + item.num_scored])
            num_tops += [row.sampling.num_prompt_logprobs] * item.num_scored
        return DrawnTokens(upload_array(np.concatenate(next_ids), self._device), num_tops, logits)

    def _forward(
        self, batch: PackedBatch, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits [num_kept, vocab_size] of the tokens ``kept``, and their argmax or None."""
        replayed = None if self._graphs is None else self._graphs.run(batch, kept)
        if replayed is not None:
            return replayed
        token_ids, positions, places = (
            upload_array(array, self._device)
            for array in (batch.token_ids, batch.positions, np.array(kept, dtype=np.int64))
        )
        if self._latest is not None:
            token_ids = self._latest.look_up(token_ids)
        step = self._attention.prepare(batch)
        return self._decoder.logits(token_ids, positions, places, step), None

    def collect(self, step: LaunchedStep) -> list[TokenOutput | None]:
        """Wait for the oldest launched step; return the scored tokens, then a token for each
        scheduled row with ``sample``, None if its logits were NaN.
        """
        if step.ended is not None:
            step.ended.wait()
        scored = [] if step.scored is None else step.scored.collect()
        if step.drawn is None:
            return scored
        tokens = step.drawn.collect()
        for (row, position), token in zip(step.places, tokens, strict=True):
            if token is not None:
                row.token_ids[position] = token.token_id
        return scored + tokens

    def warm_up(self) -> None:
        """Run some steps, so that lazy initialisation does not delay requests; capture graphs."""
        self._attention.warm_up(self.num_heads, self._spec.max_num_batched_tokens, self._progress)
        used = 0
        for plan in warm_up_steps(self._spec, self.num_blocks, len(self.layout.groups)):
            self.execute(plan)
            self._rows = RowTable(self._spec, len(self.layout.groups))
            used = max(used, len(plan.new_blocks[0].block_ids))
        self._graphs = self._capture_graphs()
        # Clear the blocks that warm-up used: a NaN that remains in a block would pass through
        # attention's mask.
        self.kv_cache[:used].zero_()

    @property
    def sleeping_tags(self) -> frozenset[str]:
        # Lost weights count as asleep: their memory is allocated, but their values are missing.
        return self._pools.sleeping_tags | ({WEIGHTS} if self._weights_lost else set())

    def sleep(self, level: int) -> int:
        """Free the memory of weights and KV cache; return the freed bytes. No row may be in use.
        ``level`` 1 keeps the weights in host memory; 2 drops them, and ``wake_up`` reads them
        again. After a MemoryPoolError, the runner is awake as before.
        """
        num_bytes = self._pools.sleep(TAGS, keep=(WEIGHTS,) if level == 1 else ())
        # True until the weights are read again; waking the KV cache alone does not change this.
        self._weights_lost |= level == 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return num_bytes

    def wake_up(self, tags: Collection[str]) -> int:
        """Allocate the memory of ``tags`` again; return the allocated bytes. The KV cache is empty
        then. Raises MemoryPoolError, or ConfigError if the weights cannot be read or have changed:
        they then still count as asleep.
        """
        waking = self._pools.sleeping_tags & set(tags)
        num_bytes = self._pools.wake_up(waking) if waking else 0
        if KV_CACHE in waking:
            self.kv_cache.zero_()
        if self._weights_lost and WEIGHTS not in self._pools.sleeping_tags:
            self._loader.reload(self._model)
            refuse_changes(self.model_files, self._digests(), "while the engine was asleep")
            self._weights_lost = False
        return num_bytes

    def _digests(self) -> dict[str, str]:
        return weight_digests(Path(self._spec.model_dir), dummy=self._spec.load_format == "dummy")

    def _new_decoder(self) -> Decoder:
        if self._device.type == "cuda":
            from pdlaunch.engine.models.fused_decoder import FusedDecoder, can_fuse

            if can_fuse(self._model):
                return FusedDecoder(self._model)
        return Decoder(self._model)

    def _new_attention(self) -> AttentionBackend:
        if self._device.type == "cpu":
            return TorchAttention(self.layout, self.kv_cache)
        from pdlaunch.engine.models.triton_attention import TritonAttention

        return TritonAttention(self.layout, self.kv_cache)

    def _capture_graphs(self) -> StepGraphs | None:
        """Capture graphs of decode steps. All ranks must do so: the graphs contain all-reduces."""
        if self._device.type == "cpu" or self._spec.enforce_eager:
            return None
        from pdlaunch.engine.models.triton_attention import TritonAttention

        assert isinstance(self._attention, TritonAttention)
        return StepGraphs(
            self._decoder,
            self._attention,
            max_rows=self._spec.max_num_seqs,
            max_blocks=-(-self._spec.max_model_len // self._spec.block_size),
            latest=self._latest,
            progress=self._progress,
        )

    def _open_device(self) -> torch.device:
        if self._spec.device == "cpu":
            # Limit the threads, but do not pin them: a pinned rank would wait behind servers and
            # router while another core is idle.
            torch.set_num_threads(self._spec.num_threads)
            return torch.device("cpu")
        device = torch.device("cuda", self._spec.device_indices[self._tp_rank])
        torch.cuda.set_device(device)
        return device


def count_kv_blocks(
    spec: EngineSpec, layout: KVCacheLayout, device: torch.device, tp: TPGroup | None
) -> int:
    """Return how many blocks fit into the memory for the KV cache; the same on all ranks of ``tp``.
    Without ``kv_cache_memory``, it is the memory left beside the weights. Raises ConfigError.
    """
    field, fix = "kv_cache_memory", "Raise it, or choose a smaller block_size."
    cache_bytes = spec.kv_cache_memory
    if cache_bytes is None:
        field = "gpu_memory_utilization"
        fix = "Raise it, lower max_num_batched_tokens, or stop other users of the GPU's memory."
        # This size cannot be planned, because only now it is known how much memory is left.
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        cache_bytes = left_for_cache(
            free_bytes=free_bytes,
            total_bytes=total_bytes,
            own_bytes=torch.cuda.memory_reserved(device),
            utilization=spec.gpu_memory_utilization,
            activation_bytes=spec.activation_bytes,
        )
    if tp is not None:
        # Ranks of a TP group share block ids, so the rank with the least memory decides.
        cache_bytes = tp.least(cache_bytes)
    if cache_bytes < layout.block_bytes:
        raise ConfigError(
            f"a KV cache of {cache_bytes} bytes is too small: a block has {layout.block_bytes}",
            field=field,
            value=getattr(spec, field),
            fix=fix,
        )
    return cache_bytes // layout.block_bytes


def left_for_cache(
    *, free_bytes: int, total_bytes: int, own_bytes: int, utilization: float, activation_bytes: int
) -> int:
    """Return how many bytes are left for the KV cache of a rank that holds ``own_bytes`` now.
    ``utilization`` is this rank's share of the GPU. Memory of other processes does not count
    against it, but it is not available either.
    """
    budget = total_bytes * utilization - own_bytes
    available = free_bytes - total_bytes * min(_MOST_SPARED, 1 - utilization)
    return max(0, int(min(budget, available) - activation_bytes))


def warm_up_steps(spec: EngineSpec, num_blocks: int, num_groups: int) -> Iterator[StepPlan]:
    """Yield plans of a short prompt, of decode steps, and on a GPU of the longest prompt and of the
    second half of a prompt. Each needs an empty row table. The results are meaningless, because all
    rows and groups use the same blocks.
    """
    block_size = spec.block_size
    longest = min(spec.max_num_batched_tokens, spec.max_model_len - 1, num_blocks * block_size - 1)
    short = min(2 * block_size, longest)
    num_streams = min(_NUM_WARM_UP_STREAMS[spec.device], spec.max_num_seqs)
    # The number of rows, and for each row the tokens before this step and those in it.
    steps = [(1, 0, short), (1, short, 1), (num_streams, short, 1)]
    if spec.device == "cuda":
        steps += [(1, 0, longest), (1, longest // 2, longest // 2)]
    for num_rows, num_before, num_tokens in steps if longest > 1 else ():
        num_known = num_before + num_tokens
        rows = range(num_rows)
        block_ids = [*range(-(-num_known // block_size))]
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        yield StepPlan(
            step_id=-1,
            new_rows=[
                NewRow(
                    row=row,
                    request_id=RequestId("warm-up"),
                    token_ids=[0] * num_known,
                    num_prompt_tokens=num_known,
                    sampling=sampling,
                )
                for row in rows
            ],
            new_blocks=[
                NewBlocks(row=row, group=group, first_block_index=0, block_ids=block_ids)
                for row in rows
                for group in range(num_groups)
            ],
            scheduled=[
                ScheduledRow(
                    row=row, num_computed_tokens=num_before, num_tokens=num_tokens, sample=True
                )
                for row in rows
            ],
        )
