"""Build a transformers model with our attention and only the weights that this rank holds.

The model is built without memory (meta device), then each weight is read, cut, converted and put in
place.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.engine.models.attention import ATTENTION_NAME, ReportProgress, register_attention
from pdlaunch.engine.models.stacked_weights import StackedPlaces
from pdlaunch.engine.models.tensor_parallel import Shard, TPGroup, add_up_rowwise, plan_cuts
from pdlaunch.errors import ConfigError

Cut = tuple[int, slice]

DUMMY_STD = 0.02
_WRAPPED_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""The place where multimodal checkpoints keep the language model."""
_IGNORED_PREFIXES = (
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def read_tensors(files: list[Path], cuts: dict[str, Cut]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the language model with its name; of cut ones only this rank's part."""
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 - not a mapping
                name = _name_in_model(key)
                if name is None:
                    continue
                cut = cuts.get(name)
                yield (
                    name,
                    checkpoint.get_tensor(key)
                    if cut is None
                    else _part(checkpoint.get_slice(key), cut),
                )


def dummy_tensor(
    name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, cut: Cut | None
) -> torch.Tensor:
    """Return small random numbers that depend on the name alone.

    So every rank of every engine draws the same model.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    whole = torch.empty(shape, dtype=dtype, device=device).normal_(
        0.0, DUMMY_STD, generator=generator
    )
    return whole if cut is None else _part(whole, cut).clone()


def _name_in_model(key: str) -> str | None:
    if key.startswith(_IGNORED_PREFIXES) or key.endswith(_IGNORED_SUFFIX):
        return None
    for wrapped, own in _WRAPPED_PREFIXES:
        if key.startswith(wrapped):
            return own + key.removeprefix(wrapped)
    return key


def _part(source: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return the part of ``source``, a tensor or a slice object of safetensors.

    The latter reads only what is asked for.
    """
    dimension, share = cut
    return source[share] if dimension == 0 else source[:, share]


def load_model(
    model_dir: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dummy: bool,
    tp: TPGroup | None,
    progress: ReportProgress,
    stacked: bool = False,
) -> nn.Module:
    """Return a causal language model in evaluation mode.

    It is called with ``use_cache=False`` and ``attention_step``. ``shape``: of
    ``read_model_shape``, which has refused what cannot be served. ``dummy``: made-up weights, only
    config.json is read. ``stacked``: weights lie in memory as ``StackedPlaces`` says. Raises
    ConfigError when the checkpoint does not fit the configuration or the heads do not divide by the
    ranks.
    """
    progress("loading libraries", None)
    register_attention()
    model: Any = _build_empty(model_dir, dtype)
    cuts = _cuts(model, shape, tp)
    weights = (
        _dummy_weights(model, cuts, device)
        if dummy
        else read_tensors(weight_files(model_dir), cuts)
    )

    shapes = {
        name: _shape_of_part(parameter.shape, cuts.get(name))
        for name, parameter in model.named_parameters()
    }
    places = StackedPlaces(shapes if stacked else {}, dtype, device)

    def assign(name: str, tensor: torch.Tensor) -> None:
        place = places.place(name)
        _assign(
            model,
            name,
            # A copy: the tensor is mapped from a file that others may change.
            tensor.to(device=device, dtype=dtype, copy=True)
            if place is None
            else place.copy_(tensor),
        )

    _fill(model, weights, cuts, assign, progress)
    model.tie_weights()
    _compute_buffers(model, device)
    if tp is not None and tp.tp_size > 1:
        add_up_rowwise(model, cuts, tp)
    model.eval().requires_grad_(requires_grad=False)
    return cast(nn.Module, model)


def reload_model(
    model: nn.Module,
    model_dir: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    dummy: bool,
    tp: TPGroup | None,
    progress: ReportProgress,
) -> None:
    """Write what ``load_model`` has loaded into the same tensors again; their content is lost,
    their addresses stay.

    Raises ConfigError when the checkpoint is not the same any more.
    """
    # Names and shapes are checked against a model without memory; the content goes into the old
    # tensors, whose addresses graphs and kernels hold.
    blank = _build_empty(model_dir, dtype)
    cuts = _cuts(blank, shape, tp)
    device = next(model.parameters()).device
    weights = (
        _dummy_weights(blank, cuts, device)
        if dummy
        else read_tensors(weight_files(model_dir), cuts)
    )
    _fill(blank, weights, cuts, lambda name, tensor: _overwrite(model, name, tensor), progress)
    _initialize(
        [module for module in model.modules() if any(True for _ in module.buffers(recurse=False))],
        model,
    )


def _build_empty(model_dir: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    # Tensors without memory have nothing to initialise, and trying to would import sympy.
    with torch.device("meta"), no_init_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    return model


def _cuts(model: Any, shape: ModelShape, tp: TPGroup | None) -> dict[str, Cut]:
    if tp is None or tp.tp_size == 1:
        return {}
    shard = Shard(tp.tp_rank, tp.tp_size, shape)
    return plan_cuts(model, model.base_model_prefix, model.config.base_model_tp_plan, shard)


def _fill(
    model: Any,
    weights: Iterator[tuple[str, torch.Tensor]],
    cuts: dict[str, Cut],
    put: Callable[[str, torch.Tensor], None],
    progress: ReportProgress,
) -> None:
    """Put each weight in its place with ``put``; tied ones once."""
    # A tied weight is another name of one that is loaded; checkpoints may hold it under both names.
    tied = set(model.all_tied_weights_keys)
    expected = {
        name: parameter.shape for name, parameter in model.named_parameters() if name not in tied
    }
    seen: set[str] = set()
    for name, tensor in weights:
        if name in tied:
            continue
        if name not in expected:
            raise _misfit(
                f"has a weight {name}, which {type(model).__name__} with this config.json does not "
                "know"
            )
        if tensor.shape != _shape_of_part(expected[name], cuts.get(name)):
            raise _misfit(
                f"has {name} of shape {tuple(tensor.shape)}, config.json means "
                f"{tuple(expected[name])}"
            )
        put(name, tensor)
        seen.add(name)
        progress("loading weights", len(seen) / len(expected))
    if missing := set(expected) - seen:
        raise _misfit(f"lacks {len(missing)} weights, {min(missing)} among them")


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Give memory to what no checkpoint holds (rotary frequencies, scales), and its content."""
    blank = []
    for module in model.modules():
        # What is still on the meta device was in no checkpoint.
        buffers = {
            name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta
        }
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if buffers:
            blank.append(module)
    _initialize(blank, model)


def _initialize(modules: list[nn.Module], model: Any) -> None:
    """Compute buffers in place, by the model's own initialisation, which spares the parameters."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in modules:
        model._init_weights(module)


def _dummy_weights(
    model: Any, cuts: dict[str, Cut], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield random weights, but for norms, which get what the model's own initialisation gives."""
    tied = set(model.all_tied_weights_keys)
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {name: f"{module_name}.{name}" for name in own}
        if not type(module).__name__.endswith("RMSNorm"):
            for name, parameter in own.items():
                if names[name] not in tied:
                    full_name = names[name]
                    yield (
                        full_name,
                        dummy_tensor(
                            full_name, parameter.shape, parameter.dtype, device, cuts.get(full_name)
                        ),
                    )
        else:
            for name, parameter in own.items():
                setattr(
                    module,
                    name,
                    nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False),
                )
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
    setattr(
        model.get_submodule(module_name), parameter_name, nn.Parameter(tensor, requires_grad=False)
    )


def _overwrite(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(tensor)


def _misfit(what: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint {what}",
        field="model",
        fix="Take config.json and weights from the same model.",
    )
