"""What an engine tells of its KV blocks is what it has, whatever happens to its requests."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.prefix_keys import as_bytes, next_keys, root_key
from pdlaunch.protocol.engine import Hello
from pdlaunch.protocol.kv_events import HeldBlocks
from tests.engine.fake_engine import FakeEngine
from tests.engine.test_leader import Recorder, add, make_leader


def num_told(told: HeldBlocks, token_ids: list[int], cache_salt: str = "") -> int:
    root = root_key(cache_salt=cache_salt)
    return told.num_held(next_keys(root, as_bytes(token_ids), told.block_size))


def num_found(engine: FakeEngine, token_ids: list[int]) -> int:
    """Return the blocks of a prefix that the engine itself finds on device and host."""
    name = f"look-{len(engine.added)}"
    engine.add(name, [*token_ids, 1], max_tokens=1)
    engine.run_all()
    return engine.finished[name].num_cached_tokens // engine.block_size


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(4, 40)), min_size=1, max_size=12),
    st.sampled_from([0, 6]),
)
def test_the_told_blocks_are_those_that_the_engine_finds(
    prompts: list[tuple[int, int]], num_host: int
) -> None:
    engine = FakeEngine(num_blocks=14, num_host=num_host)
    texts = [[kind * 100 + index % 7 for index in range(length)] for kind, length in prompts]
    for number, tokens in enumerate(texts):
        engine.add(str(number), tokens, max_tokens=3)
        engine.run_all()
    for tokens in texts:
        assert num_told(engine.told, tokens) == num_found(engine, tokens)


def test_answers_and_salts_are_in_the_keys() -> None:
    engine = FakeEngine()
    prompt = list(range(100, 113))
    engine.add("a", prompt, max_tokens=8, cache_salt="s")
    engine.run()
    answer = engine.token_ids("a")
    # The last token is never computed.
    whole = (len(prompt) + len(answer) - 1) // engine.block_size
    assert num_told(engine.told, prompt + answer, "s") == whole > len(prompt) // engine.block_size
    assert num_told(engine.told, prompt + answer) == 0
    engine.scheduler.requests.reset_prefix_cache()
    engine.take_outputs()
    engine.scheduler.requests.check_integrity()
    assert num_told(engine.told, prompt, "s") == len(engine.told) == 0


def test_a_server_that_restarts_is_told_everything() -> None:
    prompt = add("a", 3, range(9))
    recorder = Recorder(prompt)
    leader = make_leader(recorder)
    while not any(type(each).__name__ == "RequestFinished" for each in recorder.told):
        leader.turn()
    told, told_anew = HeldBlocks(), HeldBlocks()
    for change in recorder.blocks:
        told.apply(change)
    recorder.requests, recorder.blocks = [Hello()], []
    leader.turn()
    for change in recorder.blocks:
        told_anew.apply(change)
    assert len(told_anew) == len(told) > 0
    assert recorder.blocks[0].is_all
