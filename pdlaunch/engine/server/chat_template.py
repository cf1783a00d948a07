"""Renders chat templates of models in a sandbox, with the names that transformers offers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdlaunch.errors import ConfigError, RequestError

RENDER_TIMEOUT_S = 10.0
MAX_REASON_CHARS = 500
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


class ChatTemplate:
    """Messages to the text of a prompt."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """Compile the template, and the one for requests with tools where the model has one.

        Raises ConfigError when one is not valid.
        """
        try:
            self._template = _environment().from_string(source)
            self._tool_template = (
                self._template if tool_source is None else _environment().from_string(tool_source)
            )
        except TemplateError as error:
            raise ConfigError(
                f"the model's chat template is broken: {error}", field="model"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        max_chars: int,
    ) -> str:
        """Return the prompt's text, up to ``max_chars``.

        ``variables``: chat_template_kwargs of the request. Raises RequestError.
        """
        for name in variables or {}:
            if name in _OWN_NAMES:
                raise RequestError(
                    f"{name} has a field of its own", param=f"chat_template_kwargs.{name}"
                )
        try:
            template = self._tool_template if tools else self._template
            pieces = template.generate(
                **self._special_tokens | dict(variables or {}),
                messages=[dict(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
            text = _join(pieces, max_chars)
        except RequestError:
            raise
        except Exception as error:  # a template may raise anything: the messages do not fit it
            reason = str(error)[:MAX_REASON_CHARS]
            raise RequestError(
                f"the model's chat template refuses the messages: {reason}", param="messages"
            ) from None
        return _cut_after(text, messages[-1]["content"]) if continue_final_message else text


def _join(pieces: Iterator[str], max_chars: int) -> str:
    """Render a template piece by piece, within bounds. Raises RequestError."""
    rendered: list[str] = []
    num_chars = 0
    end_at = time.monotonic() + RENDER_TIMEOUT_S
    # Between pieces, not at the end: a template that loops over very many messages would hold a
    # thread for as long as all of them take (400,000 took 24 s).
    for piece in pieces:
        rendered.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise RequestError(
                (
                    "the messages, rendered by the model's chat template, have more than "
                    f"{max_chars} characters"
                ),
                param="messages",
                code="context_length_exceeded",
            )
        if time.monotonic() > end_at:
            raise RequestError(
                f"the model's chat template takes more than {RENDER_TIMEOUT_S:g} s",
                param="messages",
            )
    return "".join(rendered)


def load_chat_template(model_dir: str | Path) -> ChatTemplate | None:
    """Return a model's template, None when it has none.

    It is chat_template.jinja, else the one in tokenizer_config.json. Raises ConfigError.
    """
    directory = Path(model_dir)
    settings = _read_settings(directory / "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text("utf-8"), _special_tokens(settings))
    templates = settings.get("chat_template")
    source = templates if isinstance(templates, str) else _named_template(templates, "default")
    if source is None:
        return None
    return ChatTemplate(source, _special_tokens(settings), _named_template(templates, "tool_use"))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _GenerationTag],
        autoescape=False,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


class _GenerationTag(Extension):
    """Renders the content of ``{% generation %}...{% endgeneration %}``.

    The tag marks the assistant's text for training, and means nothing here.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _cut_after(text: str, content: str) -> str:
    """Cut the text after the last message's content, so that the model goes on with it."""
    start = text.rfind(content.strip())
    if start < 0:
        raise RequestError(
            "the chat template changes the last message", param="continue_final_message"
        )
    end = start + len(content.strip())
    return text[:end] + (
        content[len(content.rstrip()) :] if text[start:].startswith(content.lstrip()) else ""
    )


def _named_template(templates: object, name: str) -> str | None:
    """Return a template from a list of ``{"name", "template"}``."""
    if not isinstance(templates, list):
        return None
    named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    template = named.get(name)
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each name; a token is written as a string or as ``{"content": ...}``."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="model") from None
    return settings if isinstance(settings, dict) else {}
