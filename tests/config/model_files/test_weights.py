"""Directories whose weights are missing or damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pdlaunch.config.model_files.identity import sampled_digests
from pdlaunch.config.model_files.shape import INDEX, read_model_shape
from pdlaunch.config.model_files.weights import check_files, check_gguf, weight_files
from pdlaunch.errors import ConfigError
from tests.config.model_files.files import EMPTY_SAFETENSORS


def safetensors(entries: dict[str, object], data: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


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


def test_whole_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_pickles_alone_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "save_pretrained" in str(refused(tmp_path).fix)
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert weight_files(tmp_path)


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
        (GOOD[:5], "it is no safetensors file"),
        (GOOD[:20], "it is cut off at byte 20"),
        (GOOD[:-1], "it is cut off"),
        (GOOD + b"x", "or its header is wrong"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (safetensors({"a": ENTRY | {"data_offsets": [4, 12]}}, b"x" * 12), "invalid offset"),
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
}
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "vision_tower.layers.0.mlp.down_proj.weight": (3, 3),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({name: np.zeros(shape) for name, shape in SHAPES.items()}, weights_of(tmp_path))
    return tmp_path


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_files_that_fit_their_configuration_are_accepted(model: Path) -> None:
    check_files(model, read_model_shape(model))
    (model / "tokenizer.json").unlink()
    check_files(model, read_model_shape(model))


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("model")])
def test_a_tensor_of_another_shape_is_named(model: Path, name: str) -> None:
    save_file({name: np.zeros((10, 9))}, weights_of(model))
    with pytest.raises(
        ConfigError, match=r"has the shape \[10, 9\], by config.json it is"
    ) as caught:
        check_files(model, read_model_shape(model))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_hostile_headers_are_damage(model: Path, header: dict[str, object]) -> None:
    weights_of(model).write_bytes(safetensors(header, b"x" * 8))
    with pytest.raises(ConfigError, match="is damaged"):
        check_files(model, read_model_shape(model))


@pytest.mark.parametrize(
    ("name", "says"),
    [("tokenizer.json", "no regular file"), ("model.safetensors", "has no model")],
)
def test_a_file_without_an_end_is_not_read(model: Path, name: str, says: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=says):
        check_files(model, read_model_shape(model))


def test_a_tokenizer_that_is_cut_off_is_named(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"vo')
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        check_files(model, read_model_shape(model))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"12345678", "unknown content (it begins with 31 32 33 34 35 36 37 38)"),
    ],
)
def test_what_is_no_gguf_file_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        check_gguf(file)
    assert str(caught.value).startswith(f"{file} is damaged: ")
    assert said in str(caught.value)


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
