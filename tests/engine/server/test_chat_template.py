from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from pdlaunch.engine.server.text import ChatTemplate, load_chat_template
from pdlaunch.errors import RequestError

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages=HELLO, tokens=None, **options) -> str:
    return ChatTemplate(source, tokens or {}).render(
        messages, **{"add_generation_prompt": True, "max_chars": 10_000} | options
    )


def test_names_that_templates_rely_on():
    assert (
        render("{{ messages[0]['content'] | tojson }}", [{"role": "user", "content": "<é>"}])
        == '"<é>"'
    )
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ eos_token }}", tokens={"eos_token": "</s>"}) == "</s>"
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert (
        render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{{ x }}", variables={"x": 5}) == "5"


def test_a_template_s_own_refusal_is_the_callers_mistake():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError):
        render("{{ messages[7].content }}")


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


def test_the_last_message_can_go_on():
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, messages, **options) == "[hello][The answer is"
    assert render(source.replace(" | trim", ""), messages, **options) == "[hello][The answer is "


def test_where_a_template_is_found(tmp_path: Path):
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
        {"name": "default", "template": "{{ bos_token }}!"},
    ]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}}))
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO, add_generation_prompt=True, max_chars=100) == "<s>!"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert template.render(HELLO, tools=tools, add_generation_prompt=True, max_chars=100) == "f"
    (tmp_path / "chat_template.jinja").write_text("file")
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO, add_generation_prompt=True, max_chars=100) == "file"


def test_rendering_ends_at_its_longest_text():
    with pytest.raises(RequestError, match="more than 1000 characters") as raised:
        render("{% for i in range(100000) %}xxxxx{% endfor %}", max_chars=1000)
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")


def test_rendering_ends_at_its_longest_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pdlaunch.engine.server.text.RENDER_TIMEOUT_S", -1.0)
    with pytest.raises(RequestError, match="takes more than"):
        render("{% for message in messages %}x{% endfor %}")
