"""Weights in their places: real, dummy, wrapped, cut, and not fitting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from pdlaunch.config.model_files.identity import changes, model_digest, weight_digests
from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.engine.models.fused_decoder import join
from pdlaunch.engine.models.loader import load_model, read_tensors, reload_model
from pdlaunch.engine.models.tensor_parallel import Shard, plan_cuts
from pdlaunch.errors import ConfigError
from tests.engine.models.tiny import COMMON, CONFIGS, save_tiny_model


def load(
    directory: Path,
    *,
    dummy: bool = False,
    dtype: torch.dtype = torch.float32,
    stacked: bool = False,
) -> torch.nn.Module:
    reports: list[float | None] = []
    model = load_model(
        directory,
        read_model_shape(directory),
        dtype=dtype,
        device=torch.device("cpu"),
        dummy=dummy,
        tp=None,
        progress=lambda text, fraction: reports.append(fraction),
        stacked=stacked,
    )
    assert reports[-1] == 1.0
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return lambda name: folder / name if (folder / name).exists() else save_tiny_model(name, folder)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("stacked", [False, True])
def test_weights_and_buffers_equal_those_of_transformers(
    name: str, stacked: bool, tiny: Callable[[str], Path]
) -> None:
    ours, theirs = (
        load(tiny(name), stacked=stacked),
        AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32),
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    tied = read_model_shape(tiny(name)).tie_word_embeddings
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("dummy", [False, True])
def test_reloading_restores_every_tensor_in_its_place(
    name: str, dummy: bool, tiny: Callable[[str], Path]
) -> None:
    model = load(tiny(name), dummy=dummy, stacked=True)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.data.fill_(float("nan")) if tensor.is_floating_point() else tensor.data.fill_(-1)
    reports: list[float | None] = []
    reload_model(
        model,
        tiny(name),
        read_model_shape(tiny(name)),
        dtype=torch.float32,
        dummy=dummy,
        tp=None,
        progress=lambda text, fraction: reports.append(fraction),
    )
    assert reports[-1] == 1.0
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.data_ptr() == before[key][0], key
        assert torch.equal(tensor, before[key][1]), key


def test_stacked_weights_are_neighbours(tiny: Callable[[str], Path]) -> None:
    attention = load(tiny("llama-bias"), stacked=True).model.layers[1].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        joined = join(parts)
        assert joined is not None
        assert torch.equal(joined, torch.cat(parts))
        assert joined.data_ptr() == parts[0].data_ptr()
        assert join(parts[::-1]) is None
    plain = load(tiny("llama-bias")).model.layers[1].self_attn
    assert join([plain.q_proj.weight, plain.k_proj.weight]) is None


def test_dtype_is_converted_and_frequencies_stay_float32(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("gemma3"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_language_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    text = COMMON | CONFIGS["gemma3"]
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    found = load(tmp_path)
    expected = whole.model.language_model.state_dict()
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_shards_of_a_checkpoint_in_several_files(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(weight_files(tmp_path)) > 2
    for key, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_dummy_weights_do_not_depend_on_cuts(tiny: Callable[[str], Path]) -> None:
    """Every rank and engine draws the same model."""
    first, second = load(tiny("qwen3"), dummy=True), load(tiny("qwen3"), dummy=True)
    for (key, one), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
        assert torch.isfinite(one).all()
    assert first.model.norm.weight.eq(1).all()
    assert not torch.equal(
        first.model.layers[0].mlp.up_proj.weight, first.model.layers[1].mlp.up_proj.weight
    )


def change_checkpoint(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks 1 weights, model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}
            ),
            "does not know",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}),
            r"model.norm.weight of shape \(47,\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object],
    part: str,
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=part):
        load(change_checkpoint(tiny("llama"), tmp_path / "changed", change))


def test_missing_weights_are_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001.safetensors"}})
    )
    with pytest.raises(ConfigError, match="model-00001"):
        load(tmp_path)


def test_parts_of_all_ranks_make_up_the_whole(tiny: Callable[[str], Path]) -> None:
    directory = tiny("qwen2")
    shape, model = read_model_shape(directory), load(directory)
    whole = dict(read_tensors(weight_files(directory), {}))
    cuts = [
        plan_cuts(model, "model", model.config.base_model_tp_plan, Shard(tp_rank, 2, shape))
        for tp_rank in range(2)
    ]
    parts = [dict(read_tensors(weight_files(directory), cut)) for cut in cuts]
    assert len(cuts[0]) == shape.num_layers * (7 + 3)
    for name, (dimension, _) in cuts[0].items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=dimension), whole[name]), (
            name
        )


def test_digest_tells_weights_and_configurations_apart(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("llama")
    same = change_checkpoint(directory, tmp_path / "same", lambda tensors: None)
    other = change_checkpoint(
        directory,
        tmp_path / "other",
        lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].mul_(1.01),
    )
    renamed = change_checkpoint(directory, tmp_path / "renamed", lambda tensors: None)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"})
    )
    scaled = change_checkpoint(directory, tmp_path / "scaled", lambda tensors: None)
    (scaled / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    digests = [weight_digests(path) for path in (directory, same, renamed, other, scaled)]
    assert digests[0] == digests[1] == digests[2]
    assert changes(digests[0], digests[3]).startswith("model.safetensors (SHA-256 ")
    assert changes(digests[0], digests[4]).startswith("config.json (SHA-256 ")
    all_digests = [*digests, weight_digests(directory, dummy=True)]
    assert len({model_digest(each) for each in all_digests}) == 4
