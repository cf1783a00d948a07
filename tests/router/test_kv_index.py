"""What a router knows of engines' KV blocks, whatever becomes of their events."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kv_routing import LruBlocks
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
)
def test_an_index_that_is_wrong_costs_a_prompt_at_most_one_useless_choice(
    history: list[tuple[int, str]],
) -> None:
    """Whoever was chosen in vain has the blocks afterwards: the caches have room for all."""
    engines = {name: LruEngine(name, 1_000) for name in ("prefill-0", "prefill-1")}
    decode, useless, index = engine("decode-0"), Counter[int](), KVIndex()
    for number, corruption in history:
        tokens, keys = PROMPTS[number], PROMPTS[number].keys(BLOCK_SIZE)
        for name, one in engines.items():
            held = index.begin(name)
            for change in CORRUPTIONS[corruption](one.told):
                held.apply(change)
        request = prompt(num_prompt_tokens=len(tokens.token_ids), tokens=tokens)
        both = [each.engine for each in engines.values()]
        route = choose(request, [*both, decode], index=index, policy="pairs")
        assert route.prefill is not None
        promised = index.num_cached(route.prefill.name, tokens) // BLOCK_SIZE
        useless[number] += engines[route.prefill.name].serve(keys) < min(promised, len(keys))
    assert all(number <= 2 for number in useless.values()), "one at each engine"


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 15)), max_size=30),
    st.integers(1, 30),
)
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
