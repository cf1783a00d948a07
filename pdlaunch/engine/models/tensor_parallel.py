"""Tensor parallelism: the group of ranks, and the cuts of linear layers by transformers' plan.

``colwise`` layers compute a share of their outputs, ``rowwise`` layers take a share of their inputs
and add up over the group. Embedding and output layers are whole on every rank. A KV head is on
several ranks when there are more ranks than KV heads.
"""

from __future__ import annotations

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
    """Joins the ranks of one engine; all make collective calls in the same order, in place."""

    def __init__(
        self,
        rendezvous: str,
        tp_rank: int,
        tp_size: int,
        device: str,
        *,
        timeout_s: float = RENDEZVOUS_TIMEOUT_S,
    ) -> None:
        """Meet the other ranks over ``rendezvous``, a ``file://`` URL on a path that is new.

        A file store listens nowhere, and the group's own sockets are bound to loopback (unless
        GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME say otherwise). ``device``: ``cpu``, or this rank's
        ``cuda:N``. ``timeout_s`` also bounds every collective. Raises StartupError when the others
        do not come.
        """
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self._device = torch.device(device)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, LOOPBACK_INTERFACE)
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            # Of this thread: code that names no device would take memory of device 0.
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
        """Add up ``tensor`` over the ranks; a CUDA graph can hold it."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank rank 0's ``tensor``."""
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers, on every rank."""
        smallest = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's ``data`` on every rank; the others pass any bytes of equal length. Raw
        bytes travel, nothing is unpickled.
        """
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        return bytes(self.broadcast(payload).cpu().numpy())

    def close(self) -> None:
        """Leave the group; on CUDA after all graphs that hold its sums, for which NCCL waits."""
        dist.destroy_process_group()


def says_that_a_rank_is_gone(error: BaseException) -> bool:
    """Return whether a collective failed because another rank has died."""
    # torch 2.13's gloo has no class of its own for it.
    text = str(error)
    return (
        isinstance(error, RuntimeError) and "gloo" in text and any(gone in text for gone in _GONE)
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """Says which part of the model one rank holds."""

    tp_rank: int
    tp_size: int
    shape: ModelShape

    def __post_init__(self) -> None:
        """Raise ConfigError for heads or an inner size that ``tp_size`` does not divide."""
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
        """Return what this rank holds of a cut dimension of ``size``.

        Ranks that share a KV head hold the same keys and values.
        """
        if module_name.endswith((".k_proj", ".v_proj")):
            head_dim, first = size // self.shape.num_kv_heads, self.first_kv_head
            return slice(first * head_dim, (first + self.num_kv_heads) * head_dim)
        part = size // self.tp_size
        return slice(self.tp_rank * part, (self.tp_rank + 1) * part)


class RowwiseLinear(nn.Module):
    """Computes a linear layer whose inputs are spread over ranks; adds the bias after the sum."""

    def __init__(self, layer: nn.Linear, tp: TPGroup) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self._tp = tp

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features], the same on every rank, of [..., in_features / tp_size]."""
        # Each rank has the part of the sum over its own inputs. The bias is added once, afterwards.
        result = self._tp.all_reduce(linear(inputs, self.weight))
        return result if self.bias is None else result + self.bias


def plan_cuts(
    model: nn.Module, base_prefix: str, plan: Mapping[str, str] | None, shard: Shard
) -> dict[str, tuple[int, slice]]:
    """Return which parameters of ``model`` are cut: name -> (dimension, what this rank holds of
    it).

    ``plan``: ``config.base_model_tp_plan`` of transformers, with names relative to ``base_prefix``.
    Raises UnsupportedModelError when there is none or it asks for something other than cut linear
    layers and embeddings.
    """
    if not plan:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no tensor-parallel plan in transformers", field="model"
        )
    cuts: dict[str, tuple[int, slice]] = {}
    for name, module in model.named_modules():
        # The plan has a star for the number of a layer.
        relative = name.removeprefix(f"{base_prefix}.")
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", relative))
        # Embeddings stay whole whatever the plan says: cutting them is optional, and only
        # transformers 5.15 to 5.20 ask for it, where the output layer is tied to them. The rank's
        # memory then does not depend on the version.
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
    """Replace the layers whose inputs are cut by ones that add up over the group."""
    for name, (dimension, _) in cuts.items():
        if dimension == 1:
            module_name = name.removesuffix(".weight")
            layer = model.get_submodule(module_name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(module_name, RowwiseLinear(layer, tp))
