"""Build a transformers model whose attention is ours, with the weights that this rank holds and no others.

The model is built without memory (meta device), then each weight is read, cut, converted and put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdlaunch.config.model_shape import ModelShape
from pdlaunch.errors import ConfigError
from pdlaunch.models.attention import ATTENTION_NAME, register_attention
from pdlaunch.models.tensor_parallel import Shard, TPGroup, add_up_rowwise, plan_cuts
from pdlaunch.models.weights import Cut, dummy_tensor, read_tensors, weight_files

Progress = Callable[[str, float | None], None]


def load_model(
    model_dir: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dummy: bool,
    tp: TPGroup | None,
    progress: Progress,
) -> nn.Module:
    """A causal language model in evaluation mode, called with ``use_cache=False`` and ``attention_step``.

    ``shape``: of ``read_model_shape``, which has refused what cannot be served. ``dummy``: made-up weights, only config.json is
    read. Raises ConfigError when the checkpoint does not fit the configuration or the heads do not divide by the ranks.
    """
    progress("loading libraries", 0.0)
    register_attention()
    model = _build_empty(model_dir, dtype)
    shard = Shard(tp.tp_rank, tp.tp_size, shape) if tp is not None and tp.tp_size > 1 else None
    cuts = _cuts(model, shard)
    weights = _dummy_weights(model, cuts, device) if dummy else read_tensors(weight_files(model_dir), cuts)
    _fill(model, weights, cuts, dtype, device, progress)
    if shard is not None and tp is not None:
        add_up_rowwise(model, cuts, tp)
    return model.eval().requires_grad_(requires_grad=False)


def _build_empty(model_dir: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model


def _cuts(model: Any, shard: Shard | None) -> dict[str, Cut]:
    if shard is None:
        return {}
    return plan_cuts(model, model.base_model_prefix, model.config.base_model_tp_plan, shard)


def _fill(
    model: Any,
    weights: Iterator[tuple[str, torch.Tensor]],
    cuts: dict[str, Cut],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> None:
    """Put each weight in its place, then everything that no checkpoint holds (tied weights, rotary frequencies)."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    tied = set(model.all_tied_weights_keys)
    seen: set[str] = set()
    for name, tensor in weights:
        if name in tied:
            continue
        if name not in expected:
            raise _misfit(f"has a weight {name}, which {type(model).__name__} with this config.json does not know")
        if tensor.shape != _shape_of_part(expected[name], cuts.get(name)):
            raise _misfit(f"has {name} of shape {tuple(tensor.shape)}, config.json means {tuple(expected[name])}")
        _assign(model, name, tensor.to(device=device, dtype=dtype))
        seen.add(name)
        progress("loading weights", len(seen) / len(expected))
    if missing := set(expected) - seen - tied:
        raise _misfit(f"lacks {len(missing)} weights, {min(missing)} among them")
    model.tie_weights()
    _compute_buffers(model, device)


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Rotary frequencies and scales are computed from the configuration by the model's own initialisation."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if buffers:
            model._init_weights(module)


def _dummy_weights(model: Any, cuts: dict[str, Cut], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Linear layers and embeddings get random numbers, norms what the model's own initialisation gives them."""
    tied = set(model.all_tied_weights_keys)
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {name: f"{module_name}.{name}" for name in own}
        if isinstance(module, nn.Linear | nn.Embedding):
            for name, parameter in own.items():
                if names[name] not in tied:
                    full_name = names[name]
                    yield full_name, dummy_tensor(full_name, parameter.shape, parameter.dtype, device, cuts.get(full_name))
        elif own:
            for name, parameter in own.items():
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
            model._init_weights(module)
            yield from ((names[name], getattr(module, name).data) for name in own)


def _shape_of_part(shape: torch.Size, cut: Cut | None) -> torch.Size:
    if cut is None:
        return shape
    dimension, share = cut
    sizes = list(shape)
    sizes[dimension] = share.stop - share.start
    return torch.Size(sizes)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor, requires_grad=False))


def _misfit(what: str) -> ConfigError:
    return ConfigError(f"the checkpoint {what}", field="model", fix="Take config.json and weights from the same model.")
