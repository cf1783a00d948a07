"""The step benchmark runs and reports every row; its figures are nobody's business here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pdlaunch.bench.__main__ import main
from pdlaunch.bench.step.memory_floor import decode_bytes, measure_memory_rate, prefill_bytes
from pdlaunch.bench.step.timing import bench_step
from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.errors import ConfigError
from tests.engine.models.tiny import save_tiny_model

SMALL = 2**20


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_row_for_prefill_and_one_for_each_batch_size(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    rows = bench_step(
        directory,
        batch_sizes=(1, 3),
        context_tokens=20,
        num_steps=3,
        prefill_tokens=50,
        block_size=4,
        buffer_bytes=SMALL,
    )
    assert [(row.kind, row.batch_size, row.num_tokens) for row in rows] == [
        ("prefill", 1, 50),
        ("decode", 1, 20),
        ("decode", 3, 20),
    ]
    assert all(
        row.bare_s and row.engine_s > 0 and row.ratio == row.engine_s / row.bare_s for row in rows
    )
    assert all(row.floor_s == row.num_bytes / row.memory_bytes_per_s > 0 for row in rows)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_of_a_prompt_are_timed_beside_each_batch(name: str, tmp_path: Path) -> None:
    rows = bench_step(
        save_tiny_model(name, tmp_path),
        batch_sizes=(1, 3),
        context_tokens=20,
        num_steps=3,
        prefill_tokens=5,
        chunk_tokens=(7, 30),
        chunk_behind=40,
        block_size=4,
        async_scheduling=True,
        buffer_bytes=SMALL,
    )
    mixed = [row for row in rows if row.kind == "mixed"]
    assert [(row.batch_size, row.num_tokens) for row in mixed] == [(1, 7), (1, 30), (3, 7), (3, 30)]
    assert all(row.engine_s > 0 and row.bare_s is None and row.ratio is None for row in mixed)
    decode_bytes_of = {row.batch_size: row.num_bytes for row in rows if row.kind == "decode"}
    assert [row.num_bytes for row in mixed] == [decode_bytes_of[row.batch_size] for row in mixed]


def test_steps_may_be_timed_one_ahead_of_the_other(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    rows = bench_step(
        directory,
        batch_sizes=(2,),
        context_tokens=8,
        num_steps=3,
        prefill_tokens=5,
        async_scheduling=True,
        buffer_bytes=SMALL,
    )
    assert [(row.kind, row.batch_size) for row in rows] == [("prefill", 1), ("decode", 2)]


def test_made_up_weights_need_only_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(
        (save_tiny_model("llama", tmp_path) / "config.json").read_bytes()
    )
    rows = bench_step(
        tmp_path,
        batch_sizes=(2,),
        context_tokens=9,
        num_steps=2,
        prefill_tokens=[20, 40],
        load_format="dummy",
        buffer_bytes=SMALL,
    )
    assert [(row.kind, row.num_tokens) for row in rows] == [
        ("prefill", 20),
        ("prefill", 40),
        ("decode", 9),
    ]


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma3", "gpt-oss"])
def test_a_step_reads_the_weights_and_what_its_rows_attend_to(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tied = model.config.tie_word_embeddings
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    # Of five experts a token goes through two.
    read = {key: size * 2 // 5 if ".experts." in key else size for key, size in sizes.items()}
    weights = 4 * sum(
        size for key, size in read.items() if tied or not key.endswith("embed_tokens.weight")
    )
    shape = read_model_shape(directory)
    # A tenth token sees nine earlier ones of its window of ten.
    seen = sum(30 if window is None else 9 for window in shape.layer_windows)
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * 4
    assert (
        decode_bytes(shape, "float32", batch_size=3, context_tokens=30)
        == weights + 3 * seen * token_bytes
    )
    assert (
        decode_bytes(shape, "bfloat16", batch_size=3, context_tokens=30)
        == (weights + 3 * seen * token_bytes) // 2
    )
    assert (
        prefill_bytes(shape, "float32", num_tokens=30)
        == weights + 30 * shape.num_layers * token_bytes
    )


def test_memory_has_a_speed() -> None:
    assert 1e6 < measure_memory_rate(torch.device("cpu"), SMALL) < 1e13


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="reach 270 tokens, but the model takes 256"):
        bench_step(directory, context_tokens=248)
    with pytest.raises(ConfigError, match="reach 257 tokens"):
        bench_step(directory, context_tokens=8, prefill_tokens=[8, 257])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            bench_step(directory, device="cuda")


def test_the_command_prints_rows_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "model_dir": str(save_tiny_model("llama", tmp_path)),
        "batch_sizes": [1],
        "context_tokens": 9,
        "num_steps": 2,
        "buffer_bytes": SMALL,
    }
    monkeypatch.setattr(
        sys, "argv", ["bench", "step", json.dumps(arguments | {"prefill_tokens": [5]})]
    )
    main()
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["prefill", "decode"]
    assert all(row["floor_ms"] > 0 and row["memory_gb_per_s"] > 0 for row in rows)
    monkeypatch.setattr(
        sys, "argv", ["bench", "step", json.dumps(arguments | {"prefill_tokens": [500]})]
    )
    with pytest.raises(SystemExit, match=r"error: the steps reach 500 tokens.*\nfix: Take fewer"):
        main()
