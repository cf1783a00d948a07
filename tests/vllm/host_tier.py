"""The host tier of vLLM with copies between tensors of a CPU; vLLM's own copies need a GPU.

It is imported by engines of vLLM alone: all but these copies is theirs.
"""

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostTier(CPUOffloadingSpec):  # type: ignore[misc]
    def get_worker(self, kv_caches: Any) -> Any:
        if self._worker is None:
            self._worker = Copies([each.tensor for each in kv_caches.tensors], self.num_chunks)
        return self._worker


class Copies(OffloadingWorker):  # type: ignore[misc]
    def __init__(self, caches: list[torch.Tensor], num_blocks: int) -> None:
        kept = [cache.new_empty((num_blocks, cache.shape[1])) for cache in caches]
        self._pairs = list(zip(caches, kept, strict=True))
        self._ended: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(
            job_id, [(kept, cache) for cache, kept in self._pairs], dst_spec, src_spec
        )

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pairs, dst_spec, src_spec)

    def get_finished(self) -> list[Any]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Do nothing: they have ended."""

    def _copy(self, job_id: int, pairs: Any, to: Any, of: Any) -> bool:
        for target, source in pairs:
            target[torch.as_tensor(to.block_ids)] = source[torch.as_tensor(of.block_ids)]
        self._ended.append(TransferResult(job_id=job_id, success=True))
        return True
