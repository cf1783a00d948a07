"""Prompts that the router tokenizes: when, with what, and what engines get of it."""

import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlaunch.config.model_files.weights import text_digests
from pdlaunch.http.headers import DATA_PARALLEL_HEADER
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.protocol.control import Capabilities, Registry
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.router import prompt_reader
from pdlaunch.router.client_request import CHAT, COMPLETIONS, PromptRequest, read_client_request
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.kv_index import PromptTokens
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.prompt_reader import MAX_TEXT_BYTES, PromptReader, load_model
from tests.engine.server.conftest import TEMPLATE, byte_level_tokenizer
from tests.router.conftest import Stand, pairs
from tests.router.fake_engine import server, until

BLOCK_SIZE = 4
TEXT = "the quick brown fox, prefill and decode " * 4
CHAT_BODY: dict[str, Any] = {
    "messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": "hello"}]
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
IMAGE_MESSAGE = {"role": "user", "content": [{"type": "text", "text": TEXT}, IMAGE]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(lambda _: None)
    yield client
    await client.close()


def pool_of(*names: str, kind: str = "native") -> EnginePool:
    """Engines that have told what they hold."""
    pool = EnginePool(time.monotonic)
    capabilities = Capabilities(kind=kind)
    entries = [server(name, capabilities=capabilities) for name in names]
    pool.update(Registry(version=1, entries=entries))
    for name in names:
        pool.index.apply(name, KVBlocks(block_size=BLOCK_SIZE))
    return pool


def prompt_of(body: dict[str, Any]) -> PromptRequest:
    (prompt,) = read_client_request(
        CHAT if "messages" in body else COMPLETIONS,
        json.dumps(body).encode(),
        served_model_name="tiny",
        request_id=HttpRequestId("r"),
        hop_id=HopId("r"),
        headers={},
        is_vllm=True,  # takes names of adapters
    ).prompts
    return prompt


@pytest.mark.parametrize(
    "body",
    [
        CHAT_BODY,
        {**CHAT_BODY, "add_generation_prompt": False, "reasoning_effort": "low"},
        {"prompt": TEXT, "cache_salt": "s"},
    ],
)
async def test_native_engines_get_the_tokens_that_they_would_find(
    body: dict[str, Any], folder: Path, client: EngineClient
) -> None:
    reader = PromptReader(pool_of("prefill-0", "decode-0"), client, str(folder))
    # Nobody waits for the tokenizer.
    assert (await reader.read(prompt_of(body)))[1] is None
    await reader.load(text_digests(folder))
    prompt, tokens = await reader.read(prompt_of(body))
    assert prompt.num_prompt_tokens == len(tokens.token_ids) > 4 * BLOCK_SIZE
    kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    model = load_model(str(folder), text_digests(folder))
    assert model.prompts(kind.model_validate(body)) == [tokens.token_ids]  # type: ignore[arg-type]
    for raw in (prompt.prefill_body(knows_whole_request=True), prompt.decode_body({})):
        sent = kind.model_validate(msgspec.json.decode(raw))
        assert sent.prompt_token_ids == tokens.token_ids
        # Nobody tokenizes it again.
        assert model.prompts(sent)[0] is sent.prompt_token_ids  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pool", "body"),
    [
        (pool_of("prefill-0"), CHAT_BODY),
        (EnginePool(time.monotonic), CHAT_BODY),
        (pool_of("prefill-0", "decode-0"), {"prompt": "hello"}),
        (pool_of("prefill-0", "decode-0"), {"prompt": 7 * len(TEXT)}),
        (pool_of("prefill-0", "decode-0"), {"messages": [{"content": TEXT}]}),
        (pool_of("prefill-0", "decode-0"), {"messages": [TEXT] * 9}),
        (pool_of("prefill-0", "decode-0"), {"prompt": "a" * MAX_TEXT_BYTES}),
        (pool_of("prefill-0", "decode-0"), {"prompt": [3_000_000_000, *range(64)]}),
        (pool_of("prefill-0", "decode-0", kind="vllm"), {"messages": [IMAGE_MESSAGE]}),
    ],
    ids=[
        *("one engine", "no events", "few blocks", "no prompt", "no role", "no messages", "long"),
        *("a large token id", "an image"),
    ],
)
async def test_the_load_decides_where_tokens_do_not_matter_or_are_not_to_be_had(
    pool: EnginePool, body: dict[str, Any], folder: Path, client: EngineClient
) -> None:
    prompt = prompt_of(body)
    reader = PromptReader(pool, client, str(folder))
    await reader.load(text_digests(folder))
    assert await reader.read(prompt) == (prompt, None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
async def test_files_that_are_not_those_of_the_servers_tokenize_nothing(
    name: str, folder: Path, client: EngineClient, tmp_path: Path
) -> None:
    pinned = text_digests(folder)
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    (changed / name).write_text((changed / name).read_text() + " ")
    assert load_model(str(changed), pinned) is None
    (changed / name).unlink()
    assert load_model(str(changed), pinned) is None
    assert load_model(str(folder), pinned) is not None


async def test_a_file_that_changes_while_it_is_read_changes_no_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = Path(shutil.copytree(folder, tmp_path / "model"))

    def digests_then_change(read: Path) -> dict[str, str]:
        found = text_digests(read)
        (model_dir / "tokenizer_config.json").write_text('{"chat_template": "changed"}')
        return found

    monkeypatch.setattr(prompt_reader, "text_digests", digests_then_change)
    model, expected = (load_model(str(each), text_digests(folder)) for each in (model_dir, folder))
    request = ChatCompletionRequest.model_validate(CHAT_BODY)
    assert model.prompts(request) == expected.prompts(request)


async def test_vllm_gets_the_text_and_its_keys_have_adapter_and_salt(
    folder: Path, client: EngineClient
) -> None:
    pool = pool_of("prefill-0", "decode-0", kind="vllm")
    pool.engines[0].models = [ModelCard(id="tiny"), ModelCard(id="sql", parent="tiny")]
    reader = PromptReader(pool, client, str(folder))
    await reader.load(text_digests(folder))
    keys = []
    # A field of vLLM's own is no reason not to look.
    for fields in ({}, {"model": "tiny"}, {"model": "sql"}, {"cache_salt": "sql"}):
        prompt, tokens = await reader.read(prompt_of({**CHAT_BODY, "top_k": "?", **fields}))
        assert "prompt_token_ids" not in prompt.body
        keys.append(tokens.keys(BLOCK_SIZE)[0])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    given = prompt_of({"prompt": TEXT})
    prompt, tokens = await reader.read(given)
    assert tokens is not None
    assert prompt.body == given.body


async def test_a_prompt_goes_to_the_engine_and_rank_that_tell_of_its_blocks(stand: Stand) -> None:
    engines = pairs(2)
    engines[1].kv_feed = KVFeed(2)
    await stand.start(engines)
    token_ids = list(range(1, 101))
    keys = PromptTokens(token_ids).keys(BLOCK_SIZE)
    blocks = KVBlocks(block_size=BLOCK_SIZE, dp_rank=1, stored={"device": keys})
    stand.engines["prefill-1"].kv_feed.publish(blocks)
    for engine in stand.engines.values():
        engine.kv_feed.publish(KVBlocks(block_size=BLOCK_SIZE))
    await until(lambda: all(name in stand.pool.index for name in stand.engines))
    for _ in range(4):
        answer = await stand.post({"prompt": token_ids, "max_tokens": 4})
        assert answer.status == 200
    named = {
        name: [seen.headers.get(DATA_PARALLEL_HEADER) for seen in engine.seen]
        for name, engine in stand.engines.items()
    }
    assert (named["prefill-0"], named["prefill-1"]) == ([], ["1"] * 4)
    assert {*named["decode-0"], *named["decode-1"]} == {None}


async def test_an_engine_tokenizes_where_the_model_is_not_here(stand: Stand) -> None:
    await stand.start(pairs(1))
    for engine in stand.engines.values():
        engine.kv_feed.publish(KVBlocks(block_size=BLOCK_SIZE))
    await until(lambda: all(name in stand.pool.index for name in stand.engines))
    assert (await stand.post({"prompt": "a" * 100, "max_tokens": 4})).status == 200
    assert sum(engine.num_tokenized for engine in stand.engines.values()) == 1
