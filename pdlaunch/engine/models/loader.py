"""Builds a transformers model with our attention and with this rank's part of the weights.

The model is built without memory (meta device). Then each weight is read, cut to this rank's part,
converted and put into the model.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.model_files.weights import name_in_model, weight_files
from pdlaunch.engine.models.attention import ATTENTION_NAME, ReportProgress, register_attention
from pdlaunch.engine.models.tensor_parallel import Shard, TPGroup, add_up_rowwise, plan_cuts
from pdlaunch.errors import ConfigError

Cut = tuple[int, slice]
Shapes = dict[str, torch.Size]

# Layers of a module with the same input. Their weights are contiguous in memory in this order, so
# that one product computes all of them.
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """Loads the causal language model of one rank, and reloads it after its weights are lost.
    ``dummy``: use random weights and read only config.json. Both methods raise ConfigError if the
    checkpoint does not fit the configuration, or if the number of ranks does not divide the heads.
    """

    model_dir: Path
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    dummy: bool
    tp: TPGroup | None
    progress: ReportProgress

    def load(self, *, stacked: bool = False) -> nn.Module:
        """Return the model. ``stacked``: the weights of each of ``STACKS`` are contiguous."""
        self.progress("loading libraries", None)
        register_attention()
        model, cuts = self._build_empty()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if stacked:
            parts = {name: _shape_of_part(size, cuts.get(name)) for name, size in shapes.items()}
            _place_stacks(model, parts, self.dtype, self.device)

        def put(name: str, tensor: torch.Tensor) -> None:
            place = model.get_parameter(name)
            if not place.is_meta:
                place.copy_(tensor)
                return
            module_name, _, own_name = name.rpartition(".")
            # A copy, because the tensor is mapped from a file that may change.
            content = tensor.to(device=self.device, dtype=self.dtype, copy=True)
            parameter = nn.Parameter(content, requires_grad=False)
            setattr(model.get_submodule(module_name), own_name, parameter)

        self._fill(model, shapes, cuts, put)
        model.tie_weights()
        _compute_buffers(model, self.device)
        if self.tp is not None:
            add_up_rowwise(model, cuts, self.tp)
        return cast(nn.Module, model.eval().requires_grad_(requires_grad=False))

    @torch.no_grad()
    def reload(self, model: nn.Module) -> None:
        """Load the weights into the same tensors again, because CUDA graphs use their addresses."""
        # Check names and shapes against a model without memory.
        blank, cuts = self._build_empty()
        shapes = {name: parameter.shape for name, parameter in blank.named_parameters()}
        self._fill(
            blank, shapes, cuts, lambda name, tensor: model.get_parameter(name).copy_(tensor)
        )
        _initialize([module for module in model.modules() if module._buffers], model)

    def _build_empty(self) -> tuple[Any, dict[str, Cut]]:
        """Return the model without memory, and this rank's part of each parameter that is cut."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config = AutoConfig.from_pretrained(self.model_dir).get_text_config()
        # Do not initialise tensors without memory: that would import sympy.
        with torch.device("meta"), no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=ATTENTION_NAME
            )
        if self.tp is None or self.tp.tp_size == 1:
            return model, {}
        shard = Shard(self.tp.tp_rank, self.tp.tp_size, self.shape)
        plan = model.config.base_model_tp_plan
        return model, plan_cuts(model, model.base_model_prefix, plan, shard)

    def _fill(
        self,
        model: Any,
        shapes: Shapes,
        cuts: dict[str, Cut],
        put: Callable[[str, torch.Tensor], object],
    ) -> None:
        """Call ``put`` for each weight; for tied weights once."""
        # A tied weight is a second name of another weight. A checkpoint may contain both names.
        tied = set(model.all_tied_weights_keys)
        expected = {name: size for name, size in shapes.items() if name not in tied}
        if self.dummy:
            weights = _dummy_weights(expected, cuts, self.dtype, self.device)
        else:
            weights = read_tensors(weight_files(self.model_dir), cuts)
        seen: set[str] = set()
        for name, tensor in weights:
            if name in tied:
                continue
            if name not in expected:
                raise _misfit(
                    f"has an unknown weight {name}: {type(model).__name__} with this config.json "
                    "does not have it"
                )
            if tensor.shape != _shape_of_part(expected[name], cuts.get(name)):
                raise _misfit(
                    f"has {name} of shape {tuple(tensor.shape)}, config.json expects "
                    f"{tuple(expected[name])}"
                )
            put(name, tensor)
            seen.add(name)
            self.progress("loading weights", len(seen) / len(expected))
        if missing := set(expected) - seen:
            raise _misfit(f"lacks {len(missing)} weights, {min(missing)} among them")


def _place_stacks(
    model: nn.Module, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> None:
    """Allocate the weights and biases of stacked layers, uninitialised. ``shapes``: of this rank's
    part of all parameters, by name.
    """
    # If they were stacked after loading, the allocator would keep the memory of the single weights.
    for parent_name, parent in model.named_modules():
        for stack in STACKS:
            for kind in ("weight", "bias"):
                names = [f"{parent_name}.{layer}.{kind}" for layer in stack]
                if not all(name in shapes for name in names):
                    continue
                rows = [shapes[name][0] for name in names]
                whole = torch.empty((sum(rows), *shapes[names[0]][1:]), dtype=dtype, device=device)
                for layer, part in zip(stack, torch.split(whole, rows), strict=True):
                    parameter = nn.Parameter(part, requires_grad=False)
                    setattr(parent.get_submodule(layer), kind, parameter)


def read_tensors(files: list[Path], cuts: dict[str, Cut]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and this rank's part of each tensor of the language model."""
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 - not a mapping
                name = name_in_model(key)
                if name is None:
                    continue
                # A slice object reads only the requested part.
                cut = cuts.get(name)
                if cut is None:
                    yield name, checkpoint.get_tensor(key)
                else:
                    yield name, _part(checkpoint.get_slice(key), cut)


def _part(source: torch.Tensor, cut: Cut) -> torch.Tensor:
    dimension, share = cut
    return source[share] if dimension == 0 else source[:, share]


def _shape_of_part(shape: torch.Size, cut: Cut | None) -> torch.Size:
    if cut is None:
        return shape
    dimension, share = cut
    return torch.Size((*shape[:dimension], share.stop - share.start, *shape[dimension + 1 :]))


def _dummy_weights(
    shapes: Shapes, cuts: dict[str, Cut], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes.items():
        # Seeded with the name, so that all ranks of all engines have the same model.
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=dtype, device=device)
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        whole.normal_(mean, DUMMY_STD, generator=generator)
        yield name, _part(whole, cuts[name]).clone() if name in cuts else whole


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Allocate and compute the buffers that checkpoints do not have: rotary frequencies, scales."""
    blank = []
    for module in model.modules():
        # Buffers that are still on the meta device were not in the checkpoint.
        buffers = {
            name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta
        }
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if buffers:
            blank.append(module)
    _initialize(blank, model)


def _initialize(modules: list[nn.Module], model: Any) -> None:
    """Compute buffers in place with the model's own initialisation, but no parameters."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in modules:
        model._init_weights(module)


def _misfit(what: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint {what}",
        field="model",
        fix="Take config.json and weights from the same model.",
    )
