"""Tokenizes prompts in the router, if cached blocks can change the choice of engines.

::

    engines to choose from, prompt of more than a few blocks?
      ├─ no ──────────────────────────────> the load decides
      ├─ token ids of the client ─────────> unchanged
      ├─ the model's folder is here ──────> tokenizer and chat template, in a thread
      └─ otherwise ───────────────────────> an engine's /tokenize

Native engines get the token ids with the request, so that they need not tokenize it again: the
router uses the code of the engines and the files that their servers have read. vLLM gets only the
text: its chats take no token ids, and its own tokenizer decides.
"""

import asyncio
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from pdlaunch.config.model_files.weights import changes, text_digests, text_files
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.text import TextTokenizer, load_chat_template
from pdlaunch.errors import ConfigError, OverloadedError, RequestError
from pdlaunch.http.errors import RelayedError
from pdlaunch.http.limits import work_at_input
from pdlaunch.protocol.openai.body import TOKEN_IDS, parse_request
from pdlaunch.protocol.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.kv_index import PromptTokens
from pdlaunch.router.pool import EnginePool

# Longer prompts are routed by load alone: to tokenize them would take a second.
MAX_TEXT_BYTES = 2 * 1024**2
_MAX_VOCAB_SIZE = 2**31

_logger = logging.getLogger(__name__)


class PromptReader:
    """Finds the tokens of prompts. ``model_dir``: empty if the model is not on this host."""

    def __init__(self, pool: EnginePool, client: EngineClient, model_dir: str = "") -> None:
        self._pool = pool
        self._client = client
        self._model_dir = model_dir
        self._is_loading = self._is_loaded = False
        self._model: ServedModel | None = None

    async def read(self, prompt: PromptRequest) -> tuple[PromptRequest, PromptTokens | None]:
        """Return the prompt to send to engines, and its tokens; None: route by load alone."""
        text = bytes(prompt.text or b"")
        is_long = self._pool.has_choice(prompt.num_prompt_tokens)
        if not text or not is_long or len(text) > MAX_TEXT_BYTES:
            return prompt, None
        is_vllm, body = self._pool.is_vllm, prompt.body
        token_ids, is_own = list[int](), TOKEN_IDS.match(text) and not prompt.endpoint.is_chat
        salt, model_name = body.get("cache_salt"), str(body.get("model") or "")
        tokens: PromptTokens | None = None
        # Ignore invalid prompts: engines report them to clients. A token id may be of any size.
        with suppress(RequestError, RelayedError, OverloadedError, ValueError, OverflowError):
            if is_own:
                token_ids = msgspec.json.decode(text, type=list[int])
            elif self._model is not None:
                work = partial(_tokenize, self._model, prompt, is_vllm)
                token_ids = await work_at_input(True, work)
            elif self._is_loaded:
                token_ids = await self._ask(prompt)
            tokens = PromptTokens(
                token_ids,
                adapter=model_name if model_name in self._pool.adapters else "",
                cache_salt=salt if isinstance(salt, str) else "",
            )
        if tokens is None or not token_ids:
            return prompt, None
        if not is_vllm and not is_own:
            body = body | {"prompt_token_ids": msgspec.Raw(msgspec.json.encode(token_ids))}
        read = msgspec.structs.replace(prompt, body=body, num_prompt_tokens=len(token_ids))
        return read, tokens

    async def load(self, pinned: Mapping[str, str]) -> None:
        """Load the tokenizer, once. This takes a second; until then prompts are routed by load."""
        if not self._is_loading:
            self._is_loading = True
            self._model = await asyncio.to_thread(load_model, self._model_dir, pinned)
            self._is_loaded = True

    async def _ask(self, prompt: PromptRequest) -> list[int]:
        if (engine := self._pool.pick_any(())) is None:
            return []
        kind = TokenizeChatRequest if prompt.endpoint.is_chat else TokenizeCompletionRequest
        fields = {name: prompt.body[name] for name in kind.model_fields if name in prompt.body}
        return await self._client.tokenize(engine, fields, prompt.headers)


def load_model(model_dir: str, pinned: Mapping[str, str]) -> ServedModel | None:
    """Return the servers' tokenizer and chat template. None: the files are not on this host, or
    have changed since the servers read them (``pinned``: their ``text_digests``).
    """
    if not model_dir:
        return None
    try:
        # Read a copy: the files could change after their digests are computed.
        with TemporaryDirectory(prefix="pdlaunch-") as copy:
            for file in text_files(Path(model_dir)):
                shutil.copy(file, copy)
            if changed := changes(pinned, text_digests(Path(copy))):
                raise ConfigError(f"{model_dir} has changed since this launch began: {changed}")
            return ServedModel(
                name="",
                max_model_len=MAX_TEXT_BYTES,
                vocab_size=_MAX_VOCAB_SIZE,
                eos_token_ids=(),
                tokenizer=TextTokenizer.load(copy),
                chat_template=load_chat_template(copy),
            )
    except (ConfigError, OSError) as error:
        _logger.warning("prompts are tokenized by engines: %s", error)
        return None


def _tokenize(model: ServedModel, prompt: PromptRequest, is_vllm: bool) -> list[int]:
    body: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(prompt.body))
    if not is_vllm:
        generation: type[ChatCompletionRequest | CompletionRequest] = (
            ChatCompletionRequest if prompt.endpoint.is_chat else CompletionRequest
        )
        (token_ids,) = model.prompts(parse_request(generation, body, public=False))
        return token_ids
    # Do not parse the other fields: vLLM may have fields that are unknown here.
    if not prompt.endpoint.is_chat:
        text = parse_request(TokenizeCompletionRequest, body, public=False)
        return model.tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
    chat = parse_request(TokenizeChatRequest, body, public=False)
    rendered = model.render_chat(chat)
    return model.tokenizer.encode(rendered, add_special_tokens=chat.add_special_tokens)
