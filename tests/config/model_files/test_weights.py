import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pdlaunch.config.model_files.shape import INDEX, read_model_shape
from pdlaunch.config.model_files.weights import check_files, sampled_digests, weight_files
from pdlaunch.errors import ConfigError
from tests.config.model_files.files import EMPTY_SAFETENSORS, safetensors, write_weights

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GOOD = safetensors(
    {"__metadata__": {"format": "pt"}, "a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}},
    b"x" * 16,
)


def refused(folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        weight_files(folder)
    assert caught.value.field == "model"
    assert caught.value.fix
    return caught.value


def test_pickles_alone_are_refused_and_whole_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "save_pretrained" in str(refused(tmp_path).fix)
    for content in (GOOD, EMPTY_SAFETENSORS):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_missing_shards_are_named_with_the_index(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {f"w{n}": name for n, name in enumerate(names)}})
    )
    (tmp_path / names[0]).write_bytes(GOOD)
    text = str(refused(tmp_path))
    assert f"has no {names[1]}, {names[2]}, {names[3]} and 1 more, which {INDEX} names" in text


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text)
    assert f"{INDEX} is damaged: it cannot be read" in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (GOOD[:5], "it is not a safetensors file"),
        (GOOD[:20], "it is cut off at byte 20"),
        (GOOD[:-1], "it is cut off"),
        (GOOD + b"x", "or its header is wrong"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (safetensors({"a": ENTRY | {"data_offsets": [4, 12]}}, b"x" * 12), "invalid offset"),
        (safetensors({"a": ENTRY | {"shape": [2**40, 2**40]}}, b"x" * 8), "its header is wrong"),
        (safetensors({"a": ENTRY | {"dtype": "F33"}}, b"x" * 8), "its header is wrong"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    text = str(refused(tmp_path))
    assert text.startswith(f"{file} is damaged: ")
    assert said in text


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 10,
    "attention_bias": True,
}
NAMES = (
    *("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.bias"),
    "model.layers.0.mlp.down_proj.weight",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_weights(tmp_path)
    return tmp_path


def test_files_that_fit_their_configuration_are_accepted(model: Path) -> None:
    check_files(model, read_model_shape(model))
    (model / "tokenizer.json").unlink()
    weights = load_file(model / "model.safetensors")
    for name in ("model.vision_tower.norm", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        weights[name] = np.zeros(3)
    save_file(weights, model / "model.safetensors")
    check_files(model, read_model_shape(model))
    # The output layer of a tied model is a second name, which the checkpoint may have or not.
    (model / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    for _ in range(2):
        check_files(model, read_model_shape(model))
        weights.pop("lm_head.weight", None)
        save_file(weights, model / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named(model: Path, name: str) -> None:
    save_file({name: np.zeros((10, 9))}, model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"shape \[10, 9\], but config.json says") as caught:
        check_files(model, read_model_shape(model))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.bias", "model.layers.1.mlp.up_proj.weight", *NAMES])
def test_a_tensor_that_is_unknown_or_missing_is_named(model: Path, name: str) -> None:
    weights, is_missing = load_file(model / "model.safetensors"), name in NAMES
    if is_missing:
        del weights[name]
    else:
        weights[name] = np.zeros(3)
    save_file(weights, model / "model.safetensors")
    said = f"no file has {name}" if is_missing else f"describes a model without {name}"
    with pytest.raises(ConfigError, match=said):
        check_files(model, read_model_shape(model))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_file_without_an_end_is_not_read(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"not a regular file|has no model.safetensors$"):
        check_files(model, read_model_shape(model))


@pytest.mark.parametrize("name", [INDEX, "vocab.json"])
def test_a_file_that_is_too_large_is_not_read(model: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ConfigError, match="larger than"):
        check_files(model, read_model_shape(model))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_file_that_is_cut_off_is_named_also_of_a_model_that_only_vllm_knows(
    model: Path, name: str
) -> None:
    (model / name).write_text('{"version": "1.0", "model": {"vo')
    for shape in (read_model_shape(model), None):
        with pytest.raises(ConfigError, match=name):
            check_files(model, shape)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin"])
def test_weights_that_only_vllm_reads_are_told_apart(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    content = bytearray(1_000_000)
    (tmp_path / "README.md").write_text("not read")
    found = []
    for at in (0, 0, 500_000, 999_999):
        content[at] = 1
        file.write_bytes(content)
        found.append(sampled_digests(tmp_path))
        assert found[-1] == sampled_digests(file)
    assert found[0] == found[1]
    assert len({each[name] for each in found}) == 3
