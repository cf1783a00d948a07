"""A plugin of vLLM: what its CPU build lacks for experts that data parallel ranks share."""

from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_apply = CPUUnquantizedExperts.apply


def _gather(self: Any, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts = [tensor.new_empty((size, *tensor.shape[1:])) for size in sizes]
    parts[self.rank_in_group].copy_(tensor)
    for rank, part in zip(self.ranks, parts, strict=True):
        dist.broadcast(part, src=rank, group=self.device_group)
    return torch.cat(parts)


def _all_gatherv(self: Any, tensors: list[torch.Tensor], dim: int, sizes: list[int]) -> Any:
    return [_gather(self, tensor, sizes) for tensor in tensors]


def _reduce_scatterv(self: Any, tensor: torch.Tensor, dim: int, sizes: list[int]) -> Any:
    total = tensor.clone()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].clone()


def _apply_own(self: Any, **given: Any) -> None:
    """Compute with the experts of this rank: the kernel takes all ids for those of the rank."""
    if (places := given["expert_map"]) is not None:
        own = places[given["topk_ids"].long()].to(given["topk_ids"].dtype)
        given["topk_weights"] = given["topk_weights"].masked_fill(own < 0, 0.0)
        given["topk_ids"] = own.clamp(min=0)
    _apply(self, **given)


def register() -> None:
    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv
    CPUUnquantizedExperts.apply = _apply_own
