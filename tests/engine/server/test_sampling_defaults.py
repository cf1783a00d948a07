"""A model's generation_config.json says how requests that leave it open are sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pdlaunch.engine.server.served_model import read_sampling_defaults
from pdlaunch.errors import ConfigError
from tests.engine.server.fake_rank import FakeRank

# Qwen3's, and a limit.
FILE = {
    "bos_token_id": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.1,
    "repetition_penalty": 1.05,
    "max_new_tokens": 7,
    "transformers_version": "5.0.0",
}
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def sampling_dir(model_dir: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(FILE))
    return folder


async def sampled(make_engine, rank: FakeRank, folder: Path, path: str, body: dict, **settings):
    engine = await make_engine(model_dir=str(folder), **settings)
    await engine.post(path, body)
    return rank.added()[-1].sampling


async def test_what_a_request_leaves_open_is_the_models(
    make_engine, rank: FakeRank, sampling_dir: Path
) -> None:
    params = await sampled(make_engine, rank, sampling_dir, CHAT, {"messages": HELLO})
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.05)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.max_tokens == 7


async def test_what_a_request_says_counts_and_null_says_nothing(
    make_engine, rank: FakeRank, sampling_dir: Path
) -> None:
    body = {"messages": HELLO, "temperature": 0, "top_k": -1, "top_p": None, "max_tokens": 9}
    params = await sampled(make_engine, rank, sampling_dir, CHAT, body)
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 0.95)
    assert params.max_tokens == 9
    # The neutral value, too, is one that the client has chosen.
    body = {"messages": HELLO, "temperature": 1.0, "repetition_penalty": 1.0}
    params = await sampled(make_engine, rank, sampling_dir, CHAT, body)
    assert (params.temperature, params.repetition_penalty) == (1.0, 1.0)


async def test_the_setting_vllm_is_neutral(make_engine, rank: FakeRank, sampling_dir: Path) -> None:
    params = await sampled(
        make_engine, rank, sampling_dir, CHAT, {"messages": HELLO}, generation_config="vllm"
    )
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 0, 1.0)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)
    assert params.max_tokens > 7


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"temperature": -1}', "temperature: Input should be greater than or equal to 0, got -1"),
        ('{"top_k": "many"}', "top_k"),
        ("[]", "no JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_sampling_defaults(tmp_path)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "Correct generation_config.json" in str(caught.value.fix)
