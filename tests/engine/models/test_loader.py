"""Weights in their places: real, dummy, wrapped, cut, and not fitting."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.config.model_files.weights import changes, model_digest, weight_digests, weight_files
from pdlaunch.errors import ConfigError
from tests.engine.models.tiny import COMMON, CONFIGS, loader_of, save_tiny_model


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return lambda name: folder / name if (folder / name).exists() else save_tiny_model(name, folder)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("stacked", [False, True])
def test_weights_and_buffers_equal_those_of_transformers(
    name: str, stacked: bool, tiny: Callable[[str], Path]
) -> None:
    ours = loader_of(tiny(name)).load(stacked=stacked)
    theirs = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    expected, found = tensors_of(theirs), tensors_of(ours)
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
    loader = loader_of(tiny(name), dummy=dummy)
    model = loader.load(stacked=True)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in tensors_of(model).items()}
    for tensor in tensors_of(model).values():
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    loader.reload(model)
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for key, (address, content) in before.items():
        assert after[key].data_ptr() == address, key
        assert torch.equal(after[key], content), key


def test_dtype_is_converted_and_frequencies_stay_float32(tiny: Callable[[str], Path]) -> None:
    model = loader_of(tiny("gemma3"), dtype=torch.bfloat16).load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_language_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=COMMON | CONFIGS["gemma3"],
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    expected = whole.model.language_model.state_dict()
    for key, tensor in loader_of(tmp_path).load().model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_shards_of_a_checkpoint_in_several_files(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(weight_files(tmp_path)) > 2
    for key, tensor in loader_of(tmp_path).load().state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_dummy_weights_depend_on_names_alone(tiny: Callable[[str], Path]) -> None:
    """Every rank and engine draws the same model."""
    first, second = (loader_of(tiny("qwen3"), dummy=True).load() for _ in range(2))
    for (key, one), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
        assert torch.isfinite(one).all()
    assert (first.model.norm.weight - 1).abs().max() < 0.2
    mlps = [layer.mlp.up_proj.weight for layer in first.model.layers]
    assert not torch.equal(mlps[0], mlps[1])


def change_checkpoint(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tensors: tensors.pop(UP_PROJ), f"lacks 1 weights, {UP_PROJ}"),
        (lambda tensors: tensors.update({"model.bias": torch.zeros(48)}), "has an unknown weight"),
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
        loader_of(change_checkpoint(tiny("llama"), tmp_path / "changed", change)).load()


def test_digest_tells_weights_and_configurations_apart(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("llama")
    same, renamed, scaled = (
        change_checkpoint(directory, tmp_path / name, lambda tensors: None)
        for name in ("same", "renamed", "scaled")
    )
    other = change_checkpoint(
        directory, tmp_path / "other", lambda tensors: tensors[UP_PROJ].mul_(1.01)
    )
    config = json.loads((directory / "config.json").read_text())
    unread = {"transformers_version": "9", "_name_or_path": "x"}
    (renamed / "config.json").write_text(json.dumps(config | unread))
    (scaled / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    digests = [weight_digests(path) for path in (directory, same, renamed, other, scaled)]
    assert digests[0] == digests[1] == digests[2]
    assert changes(digests[0], digests[3]).startswith("model.safetensors (SHA-256 ")
    assert changes(digests[0], digests[4]).startswith("config.json (SHA-256 ")
    all_digests = [*digests, weight_digests(directory, dummy=True)]
    assert len({model_digest(each) for each in all_digests}) == 4
