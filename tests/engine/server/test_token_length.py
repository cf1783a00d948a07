from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.engine.server.chat_template import load_chat_template
from pdlaunch.engine.server.prompts import (
    PROBED_CHARS_PER_TOKEN,
    completion_prompts,
    read_completion,
)
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.tokenizer import TextTokenizer
from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.requests import CompletionRequest
from tests.engine.server.conftest import byte_level_tokenizer
from tests.engine.server.test_text_stream import METASPACE


def without_bytes(missing: str) -> Tokenizer:
    """A byte-level tokenizer whose vocabulary lacks some bytes, as that of SmolLM2 does."""
    alphabet = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char not in missing]
    tokenizer = Tokenizer(
        models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


CONTROL_4, LEAD_F1, CONTINUATION_80 = "Ą", "ñ", "Ģ"
"""How a byte-level vocabulary writes the bytes 0x04, 0xF1 and 0x80."""
BOUNDED = {
    "byte level": TextTokenizer(byte_level_tokenizer()),
    "NFC": TextTokenizer(composing()),
    "bytes are missing": TextTokenizer(without_bytes(CONTROL_4 + LEAD_F1)),
    "falls back to bytes": METASPACE,
}


@pytest.mark.parametrize("name", BOUNDED)
@given(
    text=st.text(
        st.sampled_from("a \x04e\u0301\u1f82\U00040000<|im_start|>hello\u0345"), max_size=300
    )
    | st.text(max_size=100)
)
@settings(max_examples=60, deadline=None)
def test_no_text_has_fewer_tokens_than_its_length_says(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    assert tokenizer.token_length is not None
    assert tokenizer.token_length.fewest_tokens(text) <= len(
        tokenizer.encode(text, add_special_tokens=False)
    )


def test_characters_that_a_vocabulary_loses_count_for_nothing() -> None:
    length = BOUNDED["bytes are missing"].token_length
    assert length is not None
    assert length.fewest_tokens("\x04" * 10_000) == 0
    assert length.fewest_tokens("\x04" * 10_000 + "a" * 50) == 50
    assert length.fewest_tokens("\U00040000") == 1


@pytest.mark.parametrize(
    "what",
    [
        "continuation byte",
        "strip",
        "blanks dropped",
        "pieces removed",
        "swallows blanks",
        "word piece",
    ],
)
def test_where_text_may_vanish_nothing_is_promised(what: str) -> None:
    tokenizer = byte_level_tokenizer()
    match what:
        case "continuation byte":
            tokenizer = without_bytes(CONTINUATION_80)
        case "strip":
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
        case "blanks dropped":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
            )
        case "pieces removed":
            split = pre_tokenizers.Split("-", "removed")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
        case "swallows blanks":
            tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
        case "word piece":
            tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert TextTokenizer(tokenizer).token_length is None


class CountingTokenizer(TextTokenizer):
    """Notes the length of each text that it is given."""

    def __init__(self, tokenizer: Tokenizer, *, is_bounded: bool) -> None:
        super().__init__(tokenizer)
        self.encoded: list[int] = []
        if not is_bounded:
            self.token_length = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.encoded.append(len(text))
        return super().encode(text, add_special_tokens=add_special_tokens)


def served(model_dir: Path, *, is_bounded: bool = True) -> tuple[ServedModel, CountingTokenizer]:
    tokenizer = CountingTokenizer(byte_level_tokenizer(), is_bounded=is_bounded)
    shape = read_model_shape(str(model_dir))
    template = load_chat_template(model_dir)
    return ServedModel(
        "tiny", str(model_dir), 100, shape.vocab_size, shape.eos_token_ids, tokenizer, template
    ), tokenizer


def test_a_text_that_cannot_fit_is_not_tokenized(model_dir: Path) -> None:
    model, tokenizer = served(model_dir)
    with pytest.raises(
        RequestError, match=r"has 100000 characters, which are \d+ tokens or more; .* is 100 tokens"
    ) as raised:
        completion_prompts(CompletionRequest(prompt="a" * 100_000), model)
    assert (raised.value.param, raised.value.code) == ("prompt", "context_length_exceeded")
    assert tokenizer.encoded == []


def test_of_a_text_of_unknown_length_a_part_is_tokenized(model_dir: Path) -> None:
    model, tokenizer = served(model_dir, is_bounded=False)
    with pytest.raises(RequestError, match="has more than"):
        completion_prompts(CompletionRequest(prompt="a b " * 100_000), model)
    assert tokenizer.encoded == [PROBED_CHARS_PER_TOKEN * model.max_model_len]


def test_a_long_text_of_few_tokens_is_served(model_dir: Path) -> None:
    model, _ = served(model_dir, is_bounded=False)
    model.tokenizer._tokenizer.add_tokens(["-" * 500])
    (prompt,) = completion_prompts(CompletionRequest(prompt="-" * 10_000), model)
    assert len(prompt) == 20


def test_a_list_of_token_ids_that_cannot_fit_is_not_parsed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = served(model_dir)
    monkeypatch.setattr("pdlaunch.engine.server.prompts.read_json_object", None)
    with pytest.raises(RequestError, match=r"has 1000000 tokens; .* is 100 tokens"):
        read_completion(b'{"prompt": [' + b",".join([b"5"] * 1_000_000) + b"]}", model, False)
