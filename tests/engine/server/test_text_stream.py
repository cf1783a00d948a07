"""The text of a stream is a pure function of its tokens, and all of it comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pdlaunch.engine.server.choice import TextStream
from pdlaunch.engine.server.text import TextTokenizer
from tests.engine.server.conftest import byte_level_tokenizer

BYTE_LEVEL = TextTokenizer(byte_level_tokenizer())


def metaspace_tokenizer() -> Tokenizer:
    """The decoder of Llama 2, Mistral and Gemma: words begin with U+2581, unknown characters are
    bytes.
    """
    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "lo": 3, "▁": 4} | {
        f"<0x{byte:02X}>": 5 + byte for byte in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


METASPACE = TextTokenizer(metaspace_tokenizer())


def stream(
    tokenizer: TextTokenizer = BYTE_LEVEL, prompt: list[int] | None = None, **options
) -> TextStream:
    return TextStream(tokenizer, prompt or [], **options)


def run(text_stream: TextStream, token_ids: list[int]) -> list[str]:
    """What is emitted after each token, and at the end."""
    emitted = []
    for token_id in token_ids:
        emitted.append(text_stream.push(token_id))
        if text_stream.stop_string is not None:
            return emitted
    return [*emitted, text_stream.finish()]


def byte_ids(text: str | bytes) -> list[int]:
    """One token a byte, so that every character of more is split."""
    data = text.encode() if isinstance(text, str) else text
    return [BYTE_ID[byte] for byte in data]


BYTE_ID = {BYTE_LEVEL.token_bytes(token_id)[0]: token_id for token_id in range(3, 3 + 256)}


@given(st.text())
def test_characters_of_several_tokens_come_out_whole(text):
    emitted = run(stream(), byte_ids(text))
    assert "".join(emitted) == text
    assert emitted[-1] == ("" if "�" not in text else emitted[-1])
    assert all("�" not in piece for piece in emitted) or "�" in text


@given(st.lists(st.integers(min_value=0, max_value=339)))
def test_any_tokens_give_the_text_of_decoding_them_at_once(token_ids):
    whole = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(run(stream(), token_ids)) == whole


@given(
    st.lists(st.integers(min_value=3, max_value=339)),
    st.lists(st.integers(min_value=3, max_value=339), min_size=1),
)
def test_a_prompt_of_whole_characters_changes_nothing(prompt, token_ids):
    alone = "".join(run(stream(), token_ids))
    prompt = byte_ids("☃") + prompt + byte_ids("a")
    assert "".join(run(stream(prompt=prompt), token_ids)) == alone


def test_bytes_that_are_no_text_end_as_replacement_characters():
    assert "".join(run(stream(), byte_ids(b"a\xff\xfe"))) == "a��"
    assert "".join(run(stream(), byte_ids(b"\xe2\x98"))) == "�"
    noise = run(stream(), byte_ids(b"\xff" * 100))
    assert any(noise[:40]), "noise is not held back for ever"
    assert "".join(noise) == "�" * 100


def test_a_leading_space_depends_on_what_stands_before():
    assert "".join(run(stream(METASPACE), [1, 2])) == "hello world"
    assert "".join(run(stream(METASPACE, prompt=[1]), [2, 3])) == " worldlo"


def test_byte_fallback_tokens_form_characters():
    token_ids = [1, *(5 + byte for byte in "☃".encode()), 2, *(5 + byte for byte in "né".encode())]
    emitted = run(stream(METASPACE), token_ids)
    assert "".join(emitted) == "hello☃ worldné"
    assert emitted[:4] == ["hello", "", "", "☃"]


def expected(text: str, stops: list[str]) -> str:
    """By definition: the text up to where the first complete stop string begins."""
    for end in range(len(text) + 1):
        found = [text[:end].index(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(text[:end].index(stop) for stop in stops if stop in text[:end])]
    return text


small = st.text(alphabet="ab☃", max_size=12)


@given(small, st.lists(st.text(alphabet="ab☃", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_wherever_they_are_split(text, stops):
    emitted = run(stream(stop=stops), byte_ids(text))
    assert "".join(emitted) == expected(text, stops)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "a"), (True, "a--")])
def test_a_stop_string_is_shown_on_request(include_stop, text):
    text_stream = stream(stop=["--"], include_stop=include_stop)
    assert "".join(run(text_stream, byte_ids("a--b"))) == text
    assert text_stream.stop_string == "--"


def test_text_before_min_tokens_is_not_searched():
    text_stream = stream(stop=["a"], min_tokens=3)
    assert run(text_stream, byte_ids("aaab")) == ["a", "a", ""]
