"""What a router knows of engines' KV blocks, whatever becomes of their events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kv_routing import LruBlocks
from pdlaunch.config.shared_settings import RoutingPolicy
from pdlaunch.engine.kvcache.prefix_keys import as_bytes, next_keys, root_key
from pdlaunch.errors import ProtocolError
from pdlaunch.protocol import kv_events
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks
from pdlaunch.router import kv_index
from pdlaunch.router.engine import Engine
from pdlaunch.router.kv_index import KVFollower, KVIndex, PromptTokens
from tests.router.fake_engine import until
from tests.router.test_policy import choose, engine, prompt

BLOCK_SIZE = 4
TOKENS = st.lists(st.integers(0, 2), max_size=24)


def changed(*, stored: Iterable[int] = (), removed: Iterable[int] = ()) -> KVBlocks:
    return KVBlocks(
        block_size=BLOCK_SIZE,
        num_blocks=64,
        stored={"device": [*stored]},
        removed={"device": [*removed]},
    )


@given(TOKENS, TOKENS, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]))
def test_prompts_share_the_keys_of_the_blocks_that_they_begin_with(
    one: list[int], other: list[int], adapter: str, cache_salt: str
) -> None:
    keys = PromptTokens(one).keys(BLOCK_SIZE)
    others = PromptTokens(other, adapter=adapter, cache_salt=cache_salt).keys(BLOCK_SIZE)
    assert len(keys) == len(one) // BLOCK_SIZE
    equal = [
        not adapter and not cache_salt and one[:end] == other[:end]
        for end in range(BLOCK_SIZE, min(len(one), len(other)) + 1, BLOCK_SIZE)
    ]
    assert [a == b for a, b in zip(keys, others, strict=False)] == equal
    # A chain that is continued is the same as one that is made at once.
    half = len(one) // BLOCK_SIZE // 2
    parent = keys[half - 1] if half else root_key()
    assert next_keys(parent, as_bytes(one[half * BLOCK_SIZE :]), BLOCK_SIZE) == keys[half:]


class LruEngine:
    """An engine that has room for so many blocks, and tells of them as ``deliver`` passes it on."""

    def __init__(self, name: str, num_blocks: int) -> None:
        self.engine = engine(name)
        self.blocks = LruBlocks(num_blocks)
        self.told: list[KVBlocks] = []

    def serve(self, keys: Sequence[int]) -> int:
        """Compute a prompt; return how many of its blocks were there."""
        found, gone = self.blocks.use(keys)
        self.told.append(changed(stored=keys[found:]))
        self.told.append(changed(removed=gone))
        return found


CORRUPTIONS: dict[str, Callable[[list[KVBlocks]], list[KVBlocks]]] = {
    "none": lambda told: told,
    "lost": lambda told: told[::2],
    "repeated": lambda told: [each for each in told for _ in range(2)],
    "reordered": lambda told: told[::-1],
    "late": lambda told: told[:-3],
    "a lie": lambda told: [*told, changed(stored=range(10)), changed(removed=[1])],
    "all is there": lambda told: [*told, changed(stored=ALL_KEYS)],
}
PROMPTS = [PromptTokens([kind, *range(4 * BLOCK_SIZE)] * 3) for kind in range(6)]
ALL_KEYS = [key for each in PROMPTS for key in each.keys(BLOCK_SIZE)]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(sorted(CORRUPTIONS))), max_size=40),
    st.sampled_from([1_000, 30]),
    st.sampled_from(get_args(RoutingPolicy)),
)
def test_a_wrong_index_costs_a_prompt_one_useless_choice_at_an_engine_that_keeps_its_blocks(
    history: list[tuple[int, str]], num_blocks: int, policy: RoutingPolicy
) -> None:
    """Whoever was chosen in vain has the blocks afterwards, until it evicts them."""
    engines = {name: LruEngine(name, num_blocks) for name in ("prefill-0", "prefill-1", "decode-0")}
    index, in_vain = KVIndex(), set[tuple[str, int]]()
    for number, corruption in history:
        tokens, keys = PROMPTS[number], PROMPTS[number].keys(BLOCK_SIZE)
        for name, one in engines.items():
            index.begin(name)
            for change in CORRUPTIONS[corruption](one.told):
                index.apply(name, change)
        request = prompt(num_prompt_tokens=len(tokens.token_ids), tokens=tokens)
        every = [each.engine for each in engines.values()]
        route = choose(request, every, index=index, policy=policy)
        name, there = route.engines[0].name, engines[route.engines[0].name].blocks.keys
        promised = index.find(route.engines[0], tokens)[0] // BLOCK_SIZE
        if engines[name].serve(keys) < min(promised, len(keys)):
            assert (name, number) not in in_vain
            in_vain.add((name, number))
        gone = [n for n, each in enumerate(PROMPTS) if not {*each.keys(BLOCK_SIZE)} <= {*there}]
        in_vain -= {(name, each) for each in gone}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 15)), max_size=30), st.integers(1, 30))
def test_events_in_order_tell_exactly_what_an_engine_has(
    prompts: list[tuple[int, int]], num_blocks: int
) -> None:
    one, held = LruEngine("prefill-0", num_blocks), HeldBlocks()
    for number, length in prompts:
        one.serve(PROMPTS[number].keys(BLOCK_SIZE)[:length])
    for change in one.told:
        held.apply(change)
    anew = HeldBlocks()
    for change in held.messages():
        anew.apply(change)
    for copy in (held, anew):
        assert len(copy) == len(one.blocks.keys)
        assert all(copy.num_held([key]) for key in one.blocks.keys)


def test_what_an_engine_stored_long_ago_counts_less() -> None:
    """Otherwise who had a hot prefix first would be over its share for ever."""
    index = KVIndex()
    for start in (0, 8, 16):
        index.age()
        last = range(max(0, start - 8), start)
        index.apply("prefill-0", changed(removed=last, stored=range(start, start + 8)))
    assert index.num_tokens("prefill-0")[0] == (16 // 2 + 8) * BLOCK_SIZE


def test_the_rank_with_the_prefix_is_named_unless_it_gets_more_than_its_share() -> None:
    """Requests that name no rank go where vLLM has the fewest."""
    index, decode = KVIndex(), engine("decode-0")
    tokens, keys = PROMPTS[0], PROMPTS[0].keys(BLOCK_SIZE)
    for dp_rank, stored in enumerate((keys[:2], keys[:5])):
        change = KVBlocks(block_size=BLOCK_SIZE, dp_rank=dp_rank, stored={"device": stored})
        index.apply("decode-0", change)
    assert (index.num_ranks("decode-0"), index.num_tokens("decode-0")) == (2, (7 * BLOCK_SIZE, 0))
    found = []
    with contextlib.ExitStack() as running:
        for _ in range(4):
            found.append(index.find(decode, tokens))
            dp_rank = found[-1][1]
            running.enter_context(decode.working(lambda: 0.0, num_prompt_tokens=9, dp_rank=dp_rank))
    assert found == [(5 * BLOCK_SIZE, 1)] * 3 + [(2 * BLOCK_SIZE, None)]
    index.apply("decode-0", KVBlocks(block_size=0, is_all=True))
    assert index.find(decode, tokens) == (5 * BLOCK_SIZE, 1)
    index.apply("decode-0", KVBlocks(block_size=BLOCK_SIZE, stored={"device": keys[:5]}))
    assert index.find(decode, tokens) == (5 * BLOCK_SIZE, None)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "MAX_BLOCKS", 100)
    held = HeldBlocks()
    for start in range(0, 1000, 30):
        held.apply(changed(stored=range(start, start + 30)))
    assert len(held) == 100
    held.apply(changed(removed=range(1000)))
    held.apply(changed(stored=[7]))
    assert held.num_held([7]) == 1


class Streams:
    """The streams of all engines; each first tells of key 1."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Queue[KVBlocks | None]] = {}
        self.num_opened = 0

    async def follow(self, engine: Engine) -> AsyncIterator[KVBlocks]:
        self.num_opened += 1
        stream = self.open[engine.name] = asyncio.Queue[KVBlocks | None]()
        try:
            yield changed(stored=[1])
            while (change := await stream.get()) is not None:
                yield change
            raise ProtocolError("broken")
        finally:
            del self.open[engine.name]


def told_engine(**fields: object) -> Engine:
    return engine("decode-0", **fields)


@pytest.mark.parametrize(
    "after",
    [
        [],
        [told_engine(ready=False)],
        [told_engine(processes=(2,))],
        [told_engine(times_ready=1)],
        [told_engine(role="prefill")],
    ],
    ids=["gone", "not ready", "restarted", "back", "another role"],
)
async def test_engines_that_are_not_the_same_any_more_leave_the_index_at_once(
    after: list[Engine],
) -> None:
    index, streams = KVIndex(), Streams()
    follower = KVFollower(index, streams.follow)
    follower.update([told_engine()])
    await until(lambda: "decode-0" in index)
    follower.update([told_engine()])
    assert index.num_tokens("decode-0") == (BLOCK_SIZE, 64 * BLOCK_SIZE)
    follower.update(after)
    assert "decode-0" not in index
    if after and after[0].ready:
        await until(lambda: "decode-0" in index)
    assert streams.num_opened == 1 + (after != [] and after[0].ready)
    await follower.close()
    await until(lambda: not streams.open)


async def test_a_stream_that_breaks_off_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_index, "RECONNECT_S", 0.0)
    index, streams = KVIndex(), Streams()
    follower = KVFollower(index, streams.follow)
    follower.update([told_engine()])
    await until(lambda: "decode-0" in index)
    streams.open["decode-0"].put_nowait(changed(stored=[2, 3]))
    await until(lambda: index.num_tokens("decode-0")[0] == 3 * BLOCK_SIZE)
    streams.open["decode-0"].put_nowait(None)
    await until(lambda: streams.num_opened == 2 and "decode-0" in index)
    assert index.num_tokens("decode-0")[0] == BLOCK_SIZE
    await follower.close()
