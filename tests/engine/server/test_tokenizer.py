from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.server.text import TextTokenizer
from pdlaunch.errors import ConfigError
from tests.engine.server.test_text_stream import BYTE_LEVEL, METASPACE


@given(st.text())
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text):
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.token_bytes, token_ids)) == text.encode()


def test_bytes_of_other_vocabularies():
    assert METASPACE.token_bytes(1) == b" hello"
    assert METASPACE.token_bytes(5 + 0xE2) == b"\xe2"
    assert METASPACE.token_bytes(10_000) == b""
    assert BYTE_LEVEL.token_bytes(1) == b"<|im_start|>"


def test_partial_characters_have_a_name():
    assert METASPACE.token_name(1) == " hello"
    assert METASPACE.token_name(5 + 0xE2) == "bytes:\\xe2"


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)


def test_a_files_own_truncation_does_not_cut_prompts(model_dir: Path, tmp_path: Path):
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert (
        len(TextTokenizer.load(tmp_path).encode("hello hello hello hello", add_special_tokens=True))
        > 2
    )
