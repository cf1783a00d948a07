"""Tensor parallelism: the group of ranks, and the cuts of linear layers by transformers' plan.

On each rank, a ``colwise`` layer computes a part of the outputs, and a ``rowwise`` layer takes a
part of the inputs; its results are added up over the group. Embedding and output layers are whole
on every rank. If there are more ranks than KV heads, several ranks hold the same KV head.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear

from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.engine.kvcache.groups import num_kv_heads_of_rank
from pdlaunch.errors import ConfigError, StartupError, UnsupportedModelError

RENDEZVOUS_TIMEOUT_S = 300.0
LOOPBACK_INTERFACE = "lo"
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class TPGroup:
    """The ranks of one engine. All must call collectives in the same order; they work in place."""

    def __init__(
        self,
        rendezvous: str,
        tp_rank: int,
        tp_size: int,
        device: str,
        *,
        timeout_s: float = RENDEZVOUS_TIMEOUT_S,
    ) -> None:
        """Wait for the other ranks at ``rendezvous``, a ``file://`` URL of a new path. A file store
        opens no port, and the group's sockets are bound to loopback, unless GLOO_SOCKET_IFNAME or
        NCCL_SOCKET_IFNAME name another interface. ``timeout_s`` also limits every collective.
        Raises StartupError.
        """
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self._device = torch.device(device)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, LOOPBACK_INTERFACE)
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            # Otherwise code in this thread that names no device would use memory of device 0.
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                init_method=rendezvous,
                rank=tp_rank,
                world_size=tp_size,
                timeout=timedelta(seconds=timeout_s),
                device_id=self._device if is_cuda else None,
            )
        except (RuntimeError, ValueError) as error:
            raise StartupError(
                f"tp_rank {tp_rank} of {tp_size} did not meet its group at {rendezvous}: {error}"
            ) from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up ``tensor`` over the ranks. CUDA graphs can contain this."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, number: int) -> int:
        smallest = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's ``data`` on every rank. The others pass any bytes of equal length."""
        # As raw bytes, so that nothing is unpickled.
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        return bytes(self.broadcast(payload).cpu().numpy())


def says_that_a_rank_is_gone(error: BaseException) -> bool:
    """Return True if a collective failed because another rank has died."""
    # torch 2.13's gloo has no exception class for this.
    text = str(error)
    return (
        isinstance(error, RuntimeError) and "gloo" in text and any(gone in text for gone in _GONE)
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the model that one rank holds."""

    tp_rank: int
    tp_size: int
    shape: ModelShape

    def __post_init__(self) -> None:
        shape, size = self.shape, self.tp_size
        # Several ranks may share a KV head.
        is_shared = size % shape.num_kv_heads == 0
        for name, value in (
            ("num_attention_heads", shape.num_attention_heads),
            ("num_key_value_heads", size if is_shared else shape.num_kv_heads),
            ("intermediate_size", shape.intermediate_size),
        ):
            if value % size:
                raise ConfigError(
                    f"tensor_parallel_size {size} does not divide the model's {name} {value}",
                    field="tensor_parallel_size",
                    value=size,
                    fix=f"Choose a tensor_parallel_size that divides {value}.",
                )

    @property
    def num_attention_heads(self) -> int:
        return self.shape.num_attention_heads // self.tp_size

    @property
    def num_kv_heads(self) -> int:
        return num_kv_heads_of_rank(self.shape.num_kv_heads, self.tp_size)

    @property
    def first_kv_head(self) -> int:
        # 8 ranks, 2 KV heads:   rank   0 1 2 3 4 5 6 7
        #                        head   0 0 0 0 1 1 1 1
        return self.tp_rank * self.shape.num_kv_heads // self.tp_size

    def share(self, module_name: str, size: int) -> slice:
        """Return this rank's part of a dimension of ``size``."""
        if module_name.endswith((".k_proj", ".v_proj")):
            # Ranks that share a KV head have the same part.
            head_dim, first = size // self.shape.num_kv_heads, self.first_kv_head
            return slice(first * head_dim, (first + self.num_kv_heads) * head_dim)
        part = size // self.tp_size
        return slice(self.tp_rank * part, (self.tp_rank + 1) * part)


class RowwiseLinear(nn.Module):
    """A linear layer whose inputs are spread over the ranks."""

    def __init__(self, layer: nn.Linear, tp: TPGroup) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self._tp = tp

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features], equal on all ranks, for [..., in_features / tp_size]."""
        # Each rank computes the part of the sum over its own inputs. The bias is added once.
        result = self._tp.all_reduce(linear(inputs, self.weight))
        return result if self.bias is None else result + self.bias


def plan_cuts(
    model: nn.Module, base_prefix: str, plan: Mapping[str, str] | None, shard: Shard
) -> dict[str, tuple[int, slice]]:
    """Return the parameters that are cut: name -> (dimension, this rank's part). ``plan``:
    ``config.base_model_tp_plan`` of transformers, with names relative to ``base_prefix``. Raises
    UnsupportedModelError if there is none, or if it cuts anything but linear layers and embeddings.
    """
    if not plan:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no tensor-parallel plan in transformers", field="model"
        )
    cuts: dict[str, tuple[int, slice]] = {}
    for name, module in model.named_modules():
        # The plan has a star in place of a layer's number.
        relative = name.removeprefix(f"{base_prefix}.")
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", relative))
        # Embeddings always stay whole, so that a rank's memory does not depend on transformers'
        # version. To cut them is optional: only the plans of 5.15 to 5.20 do so, if the output
        # layer is tied to them.
        if style is None or style.startswith("replicated") or isinstance(module, nn.Embedding):
            continue
        if style not in ("colwise", "rowwise") or not isinstance(module, nn.Linear):
            raise UnsupportedModelError(
                f"tensor parallelism cannot cut {name} ({style})", field="model"
            )
        size = module.out_features if style == "colwise" else module.in_features
        # Weights are [out_features, in_features].
        cut = (0 if style == "colwise" else 1, shard.share(name, size))
        cuts[f"{name}.weight"] = cut
        if style == "colwise" and module.bias is not None:
            cuts[f"{name}.bias"] = cut
    return cuts


def add_up_rowwise(model: nn.Module, cuts: Mapping[str, tuple[int, slice]], tp: TPGroup) -> None:
    """Replace layers with cut inputs by layers that add up over the group."""
    for name, (dimension, _) in cuts.items():
        if dimension == 1:
            module_name = name.removesuffix(".weight")
            layer = model.get_submodule(module_name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(module_name, RowwiseLinear(layer, tp))
