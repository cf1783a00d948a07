"""Tokens become text, text tokens, and messages a prompt. The text of a stream is a pure function
of its tokens, and all of it comes out.
"""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pdlaunch.engine.server.choice import TextStream
from pdlaunch.engine.server.text import ChatTemplate, TextTokenizer, load_chat_template
from pdlaunch.errors import ConfigError, RequestError
from tests.engine.server.conftest import byte_level_tokenizer

BYTE_LEVEL = TextTokenizer(byte_level_tokenizer())
BYTE_ID = {BYTE_LEVEL.token_bytes(token_id)[0]: token_id for token_id in range(3, 3 + 256)}


def metaspace_tokenizer() -> Tokenizer:
    """The decoder of Llama 2, Mistral and Gemma: words begin with U+2581, unknown characters are
    bytes.
    """
    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "lo": 3, "▁": 4} | {
        f"<0x{byte:02X}>": 5 + byte for byte in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


METASPACE = TextTokenizer(metaspace_tokenizer())

# Tokenizers


@given(st.text())
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text):
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.token_bytes, token_ids)) == text.encode()


def test_bytes_and_names_of_other_vocabularies():
    assert METASPACE.token_bytes(1) == b" hello"
    assert METASPACE.token_bytes(5 + 0xE2) == b"\xe2"
    assert METASPACE.token_bytes(10_000) == b""
    assert BYTE_LEVEL.token_bytes(1) == b"<|im_start|>"
    assert METASPACE.token_name(1) == " hello"
    assert METASPACE.token_name(5 + 0xE2) == "bytes:\\xe2"


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)


def test_a_files_own_truncation_does_not_cut_prompts(model_dir: Path, tmp_path: Path):
    content = json.loads((model_dir / "tokenizer.json").read_text())
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"truncation": cut}))
    loaded = TextTokenizer.load(tmp_path)
    assert len(loaded.encode("hello hello hello hello", add_special_tokens=True)) > 2


# Streams


def run(
    token_ids: list[int],
    tokenizer: TextTokenizer = BYTE_LEVEL,
    prompt: list[int] | None = None,
    **options,
) -> list[str]:
    """What is emitted after each token, and at the end."""
    stream = TextStream(tokenizer, prompt or [], **options)
    emitted = []
    for token_id in token_ids:
        emitted.append(stream.push(token_id))
        if stream.stop_string is not None:
            return emitted
    return [*emitted, stream.finish()]


def byte_ids(text: str | bytes) -> list[int]:
    """One token a byte, so that every character of more is split."""
    data = text.encode() if isinstance(text, str) else text
    return [BYTE_ID[byte] for byte in data]


@given(st.text())
def test_characters_of_several_tokens_come_out_whole(text):
    emitted = run(byte_ids(text))
    assert "".join(emitted) == text
    assert "�" in text or (emitted[-1] == "" and all("�" not in piece for piece in emitted))


TOKENS = st.lists(st.integers(min_value=3, max_value=339))


@given(st.lists(st.integers(min_value=0, max_value=339)))
def test_any_tokens_give_the_text_of_decoding_them_at_once(token_ids):
    assert "".join(run(token_ids)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


@given(TOKENS, TOKENS)
def test_a_prompt_of_whole_characters_changes_nothing(prompt, token_ids):
    prompt = byte_ids("☃") + prompt + byte_ids("a")
    assert "".join(run(token_ids, prompt=prompt)) == "".join(run(token_ids))


def test_bytes_that_are_no_text_are_not_held_back_for_ever():
    assert any(run(byte_ids(b"\xff" * 100))[:40])


def test_words_begin_with_spaces_but_the_first_and_bytes_form_characters():
    assert "".join(run([1, 2], METASPACE)) == "hello world"
    assert "".join(run([2, 3], METASPACE, prompt=[1])) == " worldlo"
    token_ids = [1, *(5 + byte for byte in "☃".encode()), 2, *(5 + byte for byte in "né".encode())]
    emitted = run(token_ids, METASPACE)
    assert "".join(emitted) == "hello☃ worldné"
    assert emitted[:4] == ["hello", "", "", "☃"]


small = st.text(alphabet="ab☃", max_size=12)


@given(small, st.lists(st.text(alphabet="ab☃", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_wherever_they_are_split(text, stops):
    """By definition: the text up to where the first complete stop string begins."""
    whole = (text[:end] for end in range(len(text) + 1))
    found = next((part for part in whole if part.endswith(tuple(stops))), None)
    expected = text
    if stops and found is not None:
        expected = text[: min(found.index(stop) for stop in stops if stop in found)]
    assert "".join(run(byte_ids(text), stop=stops)) == expected


def test_text_before_min_tokens_is_not_searched():
    assert run(byte_ids("aaab"), stop=["a"], min_tokens=3) == ["a", "a", ""]


# Chat templates

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages=HELLO, tokens=None, **options) -> str:
    return ChatTemplate(source, tokens or {}).render(
        messages, **{"add_generation_prompt": True, "max_chars": 1000} | options
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0]['content'] | tojson }}", '"<é>"'),
        ("{{ messages[0]['content'] | tojson(true) }}", '"<\\u00e9>"'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ eos_token }}", "</s>"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ x }}", "5"),
    ],
)
def test_names_that_templates_rely_on(source: str, text: str):
    messages = [{"role": "user", "content": "<é>"}]
    assert render(source, messages, {"eos_token": "</s>"}, variables={"x": 5}) == text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses the messages"),
        ("{% for i in range(100000) %}xxxxx{% endfor %}", "more than 1000 characters"),
    ],
)
def test_messages_that_do_not_fit_are_the_callers_mistake(source: str, reason: str):
    with pytest.raises(RequestError, match=reason) as raised:
        render(source)
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(attack):
    with contextlib.suppress(RequestError):
        assert render(attack) == ""


def test_rendering_ends_at_its_longest_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pdlaunch.engine.server.text.RENDER_TIMEOUT_S", -1.0)
    with pytest.raises(RequestError, match="takes more than"):
        render("{% for message in messages %}x{% endfor %}")


def test_the_last_message_can_go_on():
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, messages, **options) == "[hello][The answer is"
    assert render(source.replace(" | trim", ""), messages, **options) == "[hello][The answer is "


def test_where_a_template_is_found(tmp_path: Path):
    def found() -> str:
        template = load_chat_template(tmp_path)
        assert template is not None
        return template.render(HELLO, add_generation_prompt=True, max_chars=100)

    assert load_chat_template(tmp_path) is None
    named = [
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
        {"name": "default", "template": "{{ bos_token }}!"},
    ]
    settings = {"chat_template": named, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert found() == "<s>!"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == "file"
