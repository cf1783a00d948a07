"""Measures routing by KV events; each subcommand prints a row of JSON.

``python -m benchmarks.kv_routing index``: lookups, updates and memory of the router's index.
``... reader``: a router's CPU time for a prompt, with and without tokenization.
``... trace``: shared prefixes on simulated engines that can hold half of the prefixes, routed with
the index, and by load alone.
``... simulated``: the conversations of ``chats`` on simulated engines.
``... chats --router pdlaunch|vllm-router``: conversations through either router, with one prefill
and two decode engines of the demo model on this CPU, or with the prefill and the decode engine of
``--config FILE``, native or of vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.router_cost import held_ports, quantiles_ms, running
from pdlaunch.api import load_config
from pdlaunch.config.model_files.weights import text_digests
from pdlaunch.config.roles import Role
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.protocol.control import Address, Entry, Registry
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks, kv_blocks
from pdlaunch.router.client_request import CHAT, read_client_request
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.kv_index import KVIndex, PromptTokens
from pdlaunch.router.policy import RoutingRequest, choose
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.prompt_reader import PromptReader, load_model
from tests.e2e.client import Api, running_deployment

_PICKS = itertools.count(1)
BLOCK_SIZE = 16
DEMO = "smollm2"
KEY = "of-the-benchmark"


# The index


def measure_index() -> dict[str, Any]:
    random_ = random.Random(0)
    tokens = [random_.randrange(50_000) for _ in range(2_000)]
    rss = psutil.Process().memory_info().rss
    held = HeldBlocks()
    for _ in range(10):
        keys = [random_.getrandbits(64) for _ in range(100_000)]
        held.apply(KVBlocks(block_size=BLOCK_SIZE, stored={"device": keys}))
    state_bytes = psutil.Process().memory_info().rss - rss
    keys = PromptTokens(tokens).keys(BLOCK_SIZE)
    held.apply(
        KVBlocks(block_size=BLOCK_SIZE, removed={"device": list(held._keys["device"])[:999]})
    )
    held.apply(KVBlocks(block_size=BLOCK_SIZE, stored={"device": keys}))
    prompts = [PromptTokens(tokens) for _ in range(1_000)]
    begin_at = time.process_time()
    for prompt in prompts:
        assert held.num_held(prompt.keys(BLOCK_SIZE)) == len(keys)
    lookup_us = (time.process_time() - begin_at) / len(prompts) * 1e6
    # A message of a step: 8 new blocks are stored, 8 held blocks are removed.
    num_frames, num_held = 5_000, len(held)
    new = [random_.getrandbits(64) for _ in range(8 * num_frames)]
    old = random_.sample(list(held._keys["device"]), len(new))
    frames = [
        kv_blocks.encode(
            KVBlocks(
                block_size=BLOCK_SIZE,
                stored={"device": new[start : start + 8]},
                removed={"device": old[start : start + 8]},
            )
        )
        for start in range(0, len(new), 8)
    ]
    begin_at = time.process_time()
    for frame in frames:
        held.apply(kv_blocks.decode(frame))
    took_s = time.process_time() - begin_at
    assert len(held) == num_held
    assert held._keys["device"].issuperset(new)
    assert held._keys["device"].isdisjoint(old)
    return {
        "blocks": 1_000_000,
        "state_mb": round(state_bytes / 1e6),
        "lookup_us_of_2000_tokens": round(lookup_us, 1),
        "events_per_s": round(16 * num_frames / took_s),
    }


# The cost for a router


def told_pool(names: Sequence[str]) -> EnginePool:
    """Return a pool of native engines that have reported that they hold no blocks."""
    pool = EnginePool(time.monotonic)
    entries = [
        Entry(
            name=name,
            kind="server",
            engine=name,
            incarnation=1,
            role="prefill" if name.startswith("prefill") else "decode",
            address=Address(http=f"http://{name}"),
            state="ready",
        )
        for name in names
    ]
    pool.update(Registry(version=1, entries=entries))
    for name in names:
        pool.index.apply(name, KVBlocks(block_size=BLOCK_SIZE, num_blocks=4096))
    return pool


async def measure_reader(model_dir: str) -> dict[str, Any]:
    random_ = random.Random(0)
    raw = [
        json.dumps({"messages": [{"role": "user", "content": words(random_, 1_400)}]}).encode()
        for _ in range(200)
    ]
    pool, client = told_pool(["prefill-0", "decode-0", "decode-1"]), EngineClient(lambda _: None)
    row: dict[str, Any] = {}
    with_tokens = PromptReader(pool, client, model_dir)
    await with_tokens.load(text_digests(Path(model_dir)))
    for name, reader in {
        "with": with_tokens,
        "without": None,
    }.items():
        num_tokens = 0
        for again in range(2):  # the first round loads the tokenizer
            begin_at = time.process_time()
            for one in raw:
                request = read_client_request(
                    CHAT,
                    one,
                    served_model_name=DEMO,
                    request_id=HttpRequestId("r"),
                    hop_id=HopId("r"),
                    headers={},
                )
                (prompt,), tokens = request.prompts, None
                if reader is not None:
                    prompt, tokens = await reader.read(prompt)
                    assert tokens is not None
                    num_tokens += again * len(tokens.token_ids)
                asked = RoutingRequest(num_prompt_tokens=prompt.num_prompt_tokens, tokens=tokens)
                pool.route(asked)
                prompt.prefill_body(knows_whole_request=True)
                prompt.decode_body({})
            cpu_us = (time.process_time() - begin_at) / len(raw) * 1e6
        row[f"cpu_us_a_request_{name}_tokens"] = round(cpu_us)
        row["tokens_a_prompt"] = max(row.get("tokens_a_prompt", 0), num_tokens // len(raw))
    await client.close()
    return row


# Shared prefixes and eviction, simulated


class LruBlocks:
    """Keeps the blocks that were used last."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.keys: OrderedDict[int, None] = OrderedDict()

    def use(self, keys: Sequence[int]) -> tuple[int, list[int]]:
        """Return how many of a prompt's first blocks are there, and the blocks that go for it."""
        found = next((i for i, key in enumerate(keys) if key not in self.keys), len(keys))
        for key in keys:
            self.keys[key] = None
        for key in reversed(keys):
            self.keys.move_to_end(key)
        num_gone = len(self.keys) - self.num_blocks
        return found, [self.keys.popitem(last=False)[0] for _ in range(num_gone)]


class SimulatedEngine:
    """An engine with a cache of ``num_blocks``, which computes prompts in no time."""

    def __init__(self, name: str, role: Role, num_blocks: int, index: KVIndex) -> None:
        self.engine = Engine(
            entry=Entry(name=name, kind="server", incarnation=1, role=role),
            processes=(1,),
            ready=True,
            state="ready",
        )
        self._blocks = LruBlocks(num_blocks)
        self._index = index

    def serve(self, keys: Sequence[int]) -> int:
        """Compute a prompt; return how many of its blocks were cached."""
        self.engine.last_pick = next(_PICKS)
        found, gone = self._blocks.use(keys)
        sizes = {"block_size": BLOCK_SIZE, "num_blocks": self._blocks.num_blocks}
        self._index.apply(
            self.engine.name, KVBlocks(**sizes, stored={"device": list(keys[found:])})
        )  # type: ignore[arg-type]
        self._index.apply(self.engine.name, KVBlocks(**sizes, removed={"device": gone}))  # type: ignore[arg-type]
        return found


def measure_trace(num_prefill: int, *, by_load: bool, num_prompts: int = 6_000) -> dict[str, Any]:
    """Return the share of prompt tokens cached at prefill, and how many prompts each engine got.

    The prompts have 64 shared prefixes.
    """
    random_ = random.Random(1)
    prefixes = [[random_.randrange(50_000) for _ in range(1_024)] for _ in range(64)]
    # Half of the prefixes fit into all prefill engines together.
    num_blocks = 64 * 1_024 // BLOCK_SIZE // 2 // num_prefill
    index = KVIndex()
    prefills = [
        SimulatedEngine(f"prefill-{n}", "prefill", num_blocks, index) for n in range(num_prefill)
    ]
    decodes = [SimulatedEngine(f"decode-{n}", "decode", 100_000, KVIndex()) for n in range(2)]
    engines = [each.engine for each in (*prefills, *decodes)]
    by_name = {each.engine.name: each for each in (*prefills, *decodes)}
    num_found = num_asked = 0
    served: Counter[str] = Counter()
    weights = [1 / (rank + 1) for rank in range(64)]  # some prefixes are far more frequent
    for number in range(num_prompts):
        (prefix,) = random_.choices(prefixes, weights)
        prompt = PromptTokens([*prefix, *(random_.randrange(50_000) for _ in range(64))])
        request = RoutingRequest(
            num_prompt_tokens=len(prompt.token_ids), tokens=None if by_load else prompt
        )
        index.age()
        route = choose(request, engines, index, 0.0, "pairs")
        served[route.name.partition("->")[0]] += 1
        assert route.prefill is not None
        assert route.decode is not None
        by_name[route.decode.name].engine.last_pick = next(_PICKS)
        keys = prompt.keys(BLOCK_SIZE)
        found = by_name[route.prefill.name].serve(keys)
        if number >= num_prompts // 6:
            num_found, num_asked = num_found + found, num_asked + len(keys)
    prompts = sorted(served.values())
    return {"cached_share": round(num_found / num_asked, 3), "prompts_of_engines": prompts}


def simulate_chats(*, always_pairs: bool) -> dict[str, float]:
    """Serve the conversations of ``ChatLoad`` with one prefill and two decode engines without load.

    ``always_pairs``: every prompt goes through a pair, as with some other routers.
    """
    random_, load, index = random.Random(2), ChatLoad(), KVIndex()
    roles: dict[str, Role] = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    engines = {name: SimulatedEngine(name, role, 10_000, index) for name, role in roles.items()}

    def drawn(number: int) -> list[int]:
        return [random_.randrange(50_000) for _ in range(number)]

    system, anywhere = drawn(load.num_system_words), SimulatedEngine("", "both", 10**6, KVIndex())
    chats = [list(system) for _ in range(load.num_chats)]
    turns = [chat for chat in range(load.num_chats) for _ in range(load.num_turns)]
    random_.shuffle(turns)
    seen: set[int] = set()
    num_tokens = num_possible = 0
    computed: list[int] = []
    later: list[int] = []
    for chat in turns:
        # The chat template adds about 10 tokens to a question.
        chats[chat] += drawn(load.num_question_words + 10)
        prompt = PromptTokens(list(chats[chat]))
        chats[chat] += drawn(load.num_answer_tokens)
        request = RoutingRequest(num_prompt_tokens=len(prompt.token_ids), tokens=prompt)
        pool = [each.engine for each in engines.values()]
        index.age()
        route = choose(request, pool, index, 0.0, "pairs" if always_pairs else "load")
        assert route.decode is not None
        first, decode = engines[(route.prefill or route.decode).name], engines[route.decode.name]
        keys = prompt.keys(BLOCK_SIZE)
        num_new = len(prompt.token_ids) - BLOCK_SIZE * first.serve(keys)
        # The last token of an answer is never computed.
        decode.serve(PromptTokens(chats[chat][:-1]).keys(BLOCK_SIZE))
        num_tokens += len(prompt.token_ids)
        num_possible += BLOCK_SIZE * anywhere.serve(keys)
        anywhere.serve(PromptTokens(chats[chat][:-1]).keys(BLOCK_SIZE))
        computed.append(num_new)
        if chat in seen:
            later.append(num_new)
        seen.add(chat)
    return {
        "cached_share": round(1 - sum(computed) / num_tokens, 3),
        "possible_share": round(num_possible / num_tokens, 3),
        "tokens_before_the_first_of_later_turns": round(sum(later) / len(later), 1),
    }


# Conversations


@dataclass
class Turn:
    begin_at: float
    num_turn: int = 0
    ttft_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)  # of the prompt
    text: str = ""
    output_ids: list[int] = field(default_factory=list)


def words(random_: random.Random, number: int) -> str:
    common = "the of and a to in is you that it he was for on are as with his they at".split()  # noqa: SIM905
    return " ".join(random_.choice(common) for _ in range(number))


@dataclass(frozen=True)
class ChatLoad:
    num_chats: int = 16
    num_turns: int = 4
    num_at_once: int = 2
    num_system_words: int = 200
    num_question_words: int = 16
    num_answer_tokens: int = 64
    seed: int = 1


async def run_chats(url: str, load: ChatLoad, model: ServedModel) -> list[Turn]:
    turns: list[Turn] = []
    system = words(random.Random(load.seed), load.num_system_words)
    places = asyncio.Semaphore(load.num_at_once)

    async def chat(session: aiohttp.ClientSession, number: int) -> None:
        random_ = random.Random(1_000 * load.seed + number)
        messages = [{"role": "system", "content": system}]
        for num_turn in range(load.num_turns):
            messages.append({"role": "user", "content": words(random_, load.num_question_words)})
            # Between two turns of a chat, other chats proceed: users read and write meanwhile.
            async with places:
                turn = await ask(session, url, messages, load.num_answer_tokens)
            turn.num_turn = num_turn
            assert model.chat_template is not None
            rendered = model.chat_template.render(
                messages, add_generation_prompt=True, max_chars=10**6
            )
            turn.token_ids = model.tokenizer.encode(rendered, add_special_tokens=False)
            messages.append({"role": "assistant", "content": turn.text})
            turns.append(turn)
            sys.stderr.write(f"{len(turns)} of {load.num_chats * load.num_turns} turns\n")

    # On a busy machine an answer may take longer than aiohttp's default time-out.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(chat(session, number) for number in range(load.num_chats)))
    return turns


async def ask(
    session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]], num_tokens: int
) -> Turn:
    body = {
        "model": DEMO,
        "messages": messages,
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    turn = Turn(time.monotonic())
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", []):
                text = choice["delta"].get("content") or ""
                if text and not turn.ttft_s:
                    turn.ttft_s = time.monotonic() - turn.begin_at
                turn.text += text
                turn.output_ids += choice.get("token_ids") or []
    return turn


def possible_share(turns: Sequence[Turn], block_size: int) -> float:
    """Return the share of prompt tokens that one engine with unlimited memory would have cached."""
    seen: set[int] = set()
    num_found = num_tokens = 0
    for turn in sorted(turns, key=lambda each: each.begin_at):
        keys = PromptTokens(turn.token_ids).keys(block_size)
        found = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        num_found += found * block_size
        num_tokens += len(turn.token_ids)
        # The last token of an answer is never computed.
        seen.update(PromptTokens(turn.token_ids + turn.output_ids[:-1]).keys(block_size))
    return num_found / num_tokens


async def num_computed(urls: Sequence[str]) -> float:
    """Return the number of prompt tokens that engines have computed, neither cached nor pulled."""
    total = 0.0
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        for url in urls:
            async with session.get(f"{url}/metrics") as response:
                page = await response.text()
            pattern = r"prompt_tokens_by_source_total\{[^}]*local_compute[^}]*\} ([\d.e+]+)"
            total += sum(float(each) for each in re.findall(pattern, page))
    return total


@contextlib.contextmanager
def served(router: str, folder: Path, config: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of the router, and the URLs of the engines, prefill first."""
    flags = ["--engine", "native", "--decode", "2", "--kv-cache-memory", "256MiB"]
    environ = os.environ | {"PDLAUNCH_ENGINE_API_KEY": KEY}
    with contextlib.ExitStack() as stack:
        if config is not None:
            # Without these settings, engines of vLLM listen on no port.
            flags, ports = [config], stack.enter_context(held_ports(2))
            for role, number in zip(("PREFILL", "DECODE"), ports, strict=True):
                environ[f"PDLAUNCH_{role}__PORT"] = str(number)
        deployment = stack.enter_context(
            running_deployment(flags, environ=environ, timeout_s=400.0)
        )
        _, status = Api(deployment.url).get_object("/pdlaunch/status")
        engines = sorted(status["engines"], key=lambda each: each["role"], reverse=True)
        urls = [each["url"] for each in engines]
        if router == "pdlaunch":
            yield deployment.url, urls
            return
        with held_ports(2) as (port, other):
            command = [
                str(Path(sys.executable).with_name("vllm-router")),
                *("--vllm-pd-disaggregation", "--prefill", urls[0]),
                *(each for url in urls[1:] for each in ("--decode", url)),
                *("--kv-connector", "nixl"),
                *("--policy", "cache_aware", "--log-level", "error"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(other)),
            ]
            url = f"http://127.0.0.1:{port}"
            with running(command, url, folder / "router", OPENAI_API_KEY=KEY):
                yield url, urls


async def measure_chats(
    url: str, urls: Sequence[str], load: ChatLoad, model: ServedModel, block_size: int
) -> dict[str, Any]:
    # Warm up: first connections and first steps are not counted.
    await run_chats(url, ChatLoad(num_chats=4, num_turns=1, num_system_words=80, seed=2), model)
    before = await num_computed(urls)
    begin_at = time.monotonic()
    turns = await run_chats(url, load, model)
    took_s = time.monotonic() - begin_at
    num_tokens = sum(len(turn.token_ids) for turn in turns)
    computed = await num_computed(urls) - before
    return {
        "prompt_tokens": num_tokens,
        "cached_share": round(1 - computed / num_tokens, 4),
        "possible_share": round(possible_share(turns, block_size), 4),
        "ttft_ms_of_later_turns": quantiles_ms([t.ttft_s for t in turns if t.num_turn]),
        "ttft_ms_of_first_turns": quantiles_ms([t.ttft_s for t in turns if not t.num_turn]),
        "seconds": round(took_s, 1),
    }


def demo_model() -> tuple[str, ServedModel]:
    folder = str(next((Path.home() / ".cache/pdlaunch/models").glob("SmolLM2-135M*/")))
    model = load_model(folder, text_digests(Path(folder)))
    assert model is not None
    return folder, model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["index", "reader", "trace", "simulated", "chats"])
    parser.add_argument("--router", choices=["pdlaunch", "vllm-router"], default="pdlaunch")
    parser.add_argument("--at-once", type=int, default=2, help="concurrent turns")
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4, help="turns in each chat")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--config", help="settings of the engines, with block_size")
    given = parser.parse_args()
    match given.what:
        case "index":
            row = measure_index()
        case "reader":
            row = asyncio.run(measure_reader(demo_model()[0]))
        case "trace":
            row = {
                f"{num_prefill} prefill engines": {
                    "index": measure_trace(num_prefill, by_load=False),
                    "load": measure_trace(num_prefill, by_load=True),
                }
                for num_prefill in (2, 4, 16)
            }
        case "simulated":
            row = {
                "by events": simulate_chats(always_pairs=False),
                "pairs alone": simulate_chats(always_pairs=True),
            }
        case _:
            load = ChatLoad(
                given.chats, given.turns, given.at_once, num_answer_tokens=given.answer_tokens
            )
            block_size = load_config(given.config).config.block_size or BLOCK_SIZE
            with (
                tempfile.TemporaryDirectory() as folder,
                served(given.router, Path(folder), given.config) as (url, urls),
            ):
                measured = measure_chats(url, urls, load, demo_model()[1], block_size)
                found = asyncio.run(measured)
            row = {"router": given.router, "at_once": given.at_once} | found
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
