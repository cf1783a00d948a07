"""Converts text to token ids and back, and messages to text, without transformers and torch.

Chat templates are rendered in a sandbox, with the functions that transformers offers to them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pdlaunch.config.model_files.shape import read_json
from pdlaunch.config.model_files.weights import MAX_TEXT_BYTES
from pdlaunch.errors import ConfigError, RequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """Wraps the model's tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        kinds = [part.get("type") for part in (decoder, *decoder.get("decoders", []))]
        self._byte_of_char = _byte_alphabet() if "ByteLevel" in kinds else None

    @classmethod
    def load(cls, model_dir: str | Path) -> TextTokenizer:
        path = Path(model_dir) / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{path} cannot be read: {error}",
                field="model",
                value=str(model_dir),
                fix="The model needs a tokenizer.json.",
            ) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``, which may contain special tokens."""
        # encode_batch_fast, unlike encode, releases the GIL and computes no offsets.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        token_ids: list[int] = encoding.ids
        return token_ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of ``token_ids``: U+FFFD for invalid UTF-8, nothing for unknown ids."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within a text; empty for unknown ids."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.token_piece(token_id)
        if self._byte_of_char is not None:
            return bytes(self._byte_of_char[char] for char in piece if char in self._byte_of_char)
        byte_token = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte_token[1], 16)]) if byte_token else piece.replace("▁", " ").encode()

    def token_name(self, token_id: int) -> str:
        """Return the token's text, or ``bytes:\\xe4\\xbd`` if its bytes are not valid UTF-8."""
        token_bytes = self.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def token_piece(self, token_id: int) -> str:
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece or ""


def _byte_alphabet() -> dict[str, int]:
    # Printable Latin-1 characters stand for themselves, the other bytes for 256, 257, ... in order.
    # Source: GPT-2's byte-level BPE, as the ``tokenizers`` library's ByteLevel.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


RENDER_TIMEOUT_S = 10.0
MAX_REASON_CHARS = 500
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


class ChatTemplate:
    """Converts messages to the text of a prompt."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _compile(source)
        self.shows_tools = re.search(r"\btools\b", source) is not None
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
        """Return the prompt's text, of at most ``max_chars`` characters. ``variables``:
        chat_template_kwargs of the request. Raises RequestError.
        """
        for name in _OWN_NAMES & (variables or {}).keys():
            message = f"{name} must be set in its own field of the request"
            raise RequestError(message, param=f"chat_template_kwargs.{name}")
        try:
            pieces = self._template.generate(
                **self._special_tokens | dict(variables or {}),
                messages=[dict(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
            text = _join(pieces, max_chars)
        except RequestError:
            raise
        except Exception as error:  # templates raise anything if the messages do not fit them
            reason = str(error)[:MAX_REASON_CHARS]
            raise RequestError(
                f"the model's chat template refuses the messages: {reason}", param="messages"
            ) from None
        return _cut_after(text, messages[-1]["content"]) if continue_final_message else text


def _join(pieces: Iterator[str], max_chars: int) -> str:
    """Render a template piece by piece. Raises RequestError above the limits of size and time."""
    rendered: list[str] = []
    num_chars = 0
    end_at = time.monotonic() + RENDER_TIMEOUT_S
    # Check limits after each piece: otherwise 400,000 messages would hold a thread for 24 s.
    for piece in pieces:
        rendered.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise RequestError(
                "the messages, rendered by the model's chat template, have more than "
                f"{max_chars} characters",
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
    """Return a model's template, from chat_template.jinja or else from tokenizer_config.json."""
    directory = Path(model_dir)
    described = directory / "tokenizer_config.json"
    settings = read_json(described, MAX_TEXT_BYTES) if described.is_file() else {}
    special_tokens: dict[str, str] = {}
    for name in (f"{kind}_token" for kind in _SPECIAL_TOKENS):
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special_tokens[name] = content
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text("utf-8"), special_tokens)
    source = settings.get("chat_template")
    if isinstance(source, list):  # several templates with names
        names = {part.get("name"): part.get("template") for part in source if type(part) is dict}
        source = names.get("default")
    return ChatTemplate(source, special_tokens) if isinstance(source, str) else None


class _GenerationTag(Extension):
    """Renders the content of ``{% generation %}``, which marks text for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _GenerationTag],
        autoescape=False,
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        message = f"the model's chat template is broken: {error}"
        raise ConfigError(message, field="model") from None


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _cut_after(text: str, content: str) -> str:
    """Cut the text after the last message's content, so that the model continues this content."""
    start = text.rfind(content.strip())
    if start < 0:
        raise RequestError(
            "the chat template changes the last message", param="continue_final_message"
        )
    end = start + len(content.strip())
    return text[:end] + (
        content[len(content.rstrip()) :] if text[start:].startswith(content.lstrip()) else ""
    )
