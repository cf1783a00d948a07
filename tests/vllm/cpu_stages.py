"""A plugin of vLLM: what its CPU build lacks for pipeline stages."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_gather = GPUModelRunner.sync_and_gather_intermediate_tensors


def _gather_into_buffers(self: Any, *given: Any) -> Any:
    """Allocate the buffers first: on a GPU the profiling at the start does it."""
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return _gather(self, *given)


def register() -> None:
    GPUModelRunner.sync_and_gather_intermediate_tensors = _gather_into_buffers
