"""Defines what vLLM loads: ``{"kv_connector": "PdlaunchConnector", "kv_connector_module_path":
"pdlaunch.vllm.connector"}``, on vLLM's public interface alone. The sidecar that starts vLLM leaves
a set-up file for it.

vLLM makes it once in EngineCore (``scheduler``) and once in each worker (``worker``); the API
server only imports it. Source: KVConnectorBase_V1 of vLLM 0.24 to 0.33.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base, metrics

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.pools import KV_CACHE, MemoryPools, open_memory_pools
from pdlaunch.protocol.engine_link import KV_SETUP, KVSetup, dp_engine, from_engine, to_worker
from pdlaunch.protocol.process.bootstrap import ControlClient
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import TransferCommand
from pdlaunch.vllm.layout import UnknownLayout, read_layout, window_of
from pdlaunch.vllm.scheduling import GroupShape, Scheduling
from pdlaunch.vllm.worker import FIGURES, Results, Worker

# Reports failed loads by request, for models with several groups too; from 0.30 on.
_TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)

# Beside a host tier vLLM finds the class of its figures by name.
with contextlib.suppress(ValueError):  # it is known already
    KVConnectorFactory.register_connector("PdlaunchConnector", __name__, "PdlaunchConnector")


@dataclass
class Orders(base.KVConnectorMetadata):  # type: ignore[misc]
    """Carries the scheduler's commands to the workers with each step."""

    commands: list[TransferCommand] = field(default_factory=list)
    is_idle: bool = False  # nothing is computed in this step


@dataclass
class PdlaunchStats(metrics.KVConnectorStats):  # type: ignore[misc]
    """Carries the figures of the workers, which add up, to vLLM's metrics and log."""

    data: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: PdlaunchStats) -> PdlaunchStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0.0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name.replace("_", " "): round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class PdlaunchMetrics(metrics.KVConnectorPromMetrics):  # type: ignore[misc]
    """Shows the figures in vLLM's ``/metrics``, as native engines show them."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], values_by_engine: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, values_by_engine)
        self._counters = {}
        for name, text in FIGURES.items():
            counter = self._counter_cls(
                name=f"pdlaunch_{name}", documentation=text, labelnames=labelnames
            )
            for engine, values in values_by_engine.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[engine_idx, name].inc(value)


class PdlaunchConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]
    """Hands KV blocks over as native engines do: leases, pulls, proof before use."""

    def __init__(self, vllm_config: Any, role: base.KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises ValueError, with the reason, for an engine whose blocks cannot be handed over."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._setup = _read_setup()
        self._config = vllm_config
        self._groups = kv_cache_config.kv_cache_groups
        self._kv_config = kv_cache_config
        self._worker: Worker | None = None
        self._link: ControlClient | None = None
        self._pools = MemoryPools()
        self._is_idle = False
        if reason := _refusal(vllm_config, len(self._groups)):
            raise _refused(reason)
        _show_logs()
        if role == base.KVConnectorRole.SCHEDULER:
            dp_rank = vllm_config.parallel_config.data_parallel_index
            setup = self._setup
            self._link = ControlClient(
                SecureContext(setup.keys),
                setup.link,
                f"{dp_engine(setup.name, dp_rank, setup.dp_size)}/scheduler",
                lambda _: None,
                encode=from_engine.encode,
                decode=to_worker.decode,
            )
            self._scheduling = Scheduling(
                self._setup,
                KVTransferSettings.model_validate_json(self._setup.kv_transfer),
                [_shape_of(group) for group in self._groups],
                self._link.send,
                dp_rank=dp_rank,
                tp_size=vllm_config.parallel_config.world_size,
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        if vllm_config.model_config.use_mla:
            return None
        # Heads of a block side by side: engines of other TP sizes read ranges of heads. A host tier
        # has to ask by the same name.
        return "LBHNC" if find_spec("vllm.v1.kv_cache_layout") else "HND"

    # In EngineCore

    def on_new_request(self, request: Any) -> None:
        self._scheduling.added(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        count = self._scheduling.num_matched(request, num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        is_idle = scheduler_output.total_num_scheduled_tokens == 0
        return Orders(self._scheduling.take_commands(), is_idle)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduling.received(connector_output.finished_recving or ())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # A prompt that ended with its first token needs no decode, one that was aborted has none.
        status = request.status.name
        params = self._scheduling.finished(
            request,
            block_ids,
            is_prefilled=status == "FINISHED_LENGTH_CAPPED",
            has_stopped=status in ("FINISHED_STOPPED", "FINISHED_REPETITION"),
        )
        return params is not None, params

    # In the workers

    def get_mem_pool_context(self) -> contextlib.AbstractContextManager[None] | None:
        model = self._config.model_config
        if not (model.enable_sleep_mode or model.enable_cumem_allocator):
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        self._pools = open_memory_pools(enabled=True, device=device)
        return self._pools.memory_pool(KV_CACHE)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        parallel, model = self._config.parallel_config, self._config.model_config
        # Ranks of all pipeline stages count as one group, in which each has whole pages.
        rank, num_stages = parallel.rank % parallel.world_size, parallel.pipeline_parallel_size
        try:
            layout = read_layout(
                kv_caches,
                self._kv_config,
                total_kv_heads=model.get_total_num_kv_heads(),
                tp_size=parallel.tensor_parallel_size,
                num_stages=num_stages,
                rank=rank,
                by_head=self._setup.by_head,
            )
        except UnknownLayout as error:
            raise _refused(str(error)) from error
        self._worker = Worker(
            self._setup,
            layout,
            dp_rank=parallel.data_parallel_index,
            tp_rank=rank,
            tp_size=parallel.world_size,
            dtype=str(model.dtype).removeprefix("torch."),
            vllm_version=vllm.__version__,
            pools=self._pools,
        )

    def unregister_kv_caches(self) -> None:
        if self._worker is not None:
            self._worker.sleep()

    def restore_kv_caches(self) -> None:
        if self._worker is not None:
            self._worker.wake_up()

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        metadata = self._get_connector_metadata()
        if self._worker is not None and isinstance(metadata, Orders):
            self._worker.submit(metadata.commands)
            self._is_idle = metadata.is_idle

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: blocks are pulled before the request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Do nothing: decode engines read the blocks where they lie."""

    def wait_for_save(self) -> None:
        """Do nothing: leases keep the blocks."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._results = Results()
        if self._worker is not None:
            self._results = self._worker.take(idle=self._is_idle)
        return self._results.sent or None, self._results.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        self.get_finished(finished_req_ids)
        results = self._results
        return _TransferResults(results.sent, results.received, results.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        # Called behind the results of a step. Later versions hear of requests, above.
        return self._results.bad_blocks if _TransferResults is None else set()

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        # vLLM must not fill these blocks with zeros while they are pulled.
        return tuple(range(len(self._groups)))

    def get_kv_connector_stats(self) -> PdlaunchStats | None:
        figures = None if self._worker is None else self._worker.take_figures()
        return PdlaunchStats(data=figures) if figures else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdlaunchStats:
        return PdlaunchStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> PdlaunchMetrics:
        return PdlaunchMetrics(*arguments)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._link is not None:
            self._link.close()


def _read_setup() -> KVSetup:
    name = os.environ.get(KV_SETUP)
    if not name:
        raise ValueError(
            f"pdlaunch.vllm.connector is for engines that pdlaunch starts: {KV_SETUP} is not set"
        )
    return msgspec.json.decode(Path(name).read_bytes(), type=KVSetup)


def _refusal(vllm_config: Any, num_groups: int) -> str:
    """Return why blocks of an engine cannot be handed over; empty: they can."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} splits its KV between ranks"
    if vllm_config.speculative_config is not None:
        return "a draft model (speculative_config) keeps KV of its own"
    if num_groups > 1 and _TransferResults is None:
        return (
            f"its layers keep KV in {num_groups} ways, and vLLM {vllm.__version__} ignores failed "
            "loads of these: use vLLM 0.30 or newer, or disable-hybrid-kv-cache-manager"
        )
    missing = "unregister_kv_caches" if model.enable_sleep_mode else "get_mem_pool_context"
    if (model.enable_sleep_mode or model.enable_cumem_allocator) and not hasattr(
        base.KVConnectorBase_V1, missing
    ):
        since = "0.33" if model.enable_sleep_mode else "0.31"
        return (
            "memory of vLLM's CuMem allocator (enable_sleep_mode, enable_cumem_allocator) has no "
            f"handles for peers, and vLLM takes no other memory before {since}"
        )
    return ""


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"KV blocks of this engine cannot be handed over: {reason} (kv_transfer.connector: "
        "vllm-nixl uses vLLM's own connector, unproven)"
    )


def _shape_of(group: Any) -> GroupShape:
    spec = group.kv_cache_spec
    one = next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))
    kind = type(one).__name__
    # Without the hybrid manager vLLM keeps all blocks of layers that see a window.
    drops = kind.startswith(("SlidingWindow", "ChunkedLocalAttention"))
    return GroupShape(
        block_size=spec.block_size,
        window=window_of(one) if drops else None,
        in_chunks=kind.startswith("ChunkedLocalAttention"),
        is_state=kind.startswith("Mamba"),
    )


def _show_logs() -> None:
    """Have vLLM's own handlers show what pdlaunch logs."""
    ours = logging.getLogger("pdlaunch")
    if not ours.handlers:
        ours.handlers = logging.getLogger("vllm").handlers
        ours.setLevel(logging.INFO)
