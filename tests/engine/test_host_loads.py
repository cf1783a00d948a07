"""What the scheduler does with the host tier, one story at a time; ``test_scheduler_machine`` has
all the others.
"""

import pytest

from pdlaunch.engine.kvcache.groups import KVCacheGroup
from tests.engine.fake_engine import FULL, FakeEngine, output, sliding

PROMPT = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 3, 1, 4]
"""Three full blocks of 4 and a token."""
OTHER = [6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0]
HYBRID = (FULL, sliding(5))


def make_engine(
    groups: tuple[KVCacheGroup, ...] = (FULL,), num_blocks: int = 6, **options: int
) -> FakeEngine:
    """The device has room for one prompt and its answer; the host has room for all."""
    return FakeEngine(groups=groups, num_blocks=num_blocks * len(groups), num_host=200, **options)


def engine_after_first(
    groups: tuple[KVCacheGroup, ...] = (FULL,), num_others: int = 1, **options: int
) -> FakeEngine:
    """``PROMPT`` was served; others have pushed its blocks out of the device."""
    engine = make_engine(groups, **options)
    engine.add("first", PROMPT)
    engine.run_all()
    for index in range(num_others):
        engine.add(f"other-{index}", [index, *OTHER], max_tokens=9)
        engine.run_all()
    return engine


@pytest.mark.parametrize("groups", [(FULL,), HYBRID])
def test_what_left_the_device_comes_back_from_the_host(groups: tuple[KVCacheGroup, ...]) -> None:
    engine = engine_after_first(groups)
    num_computed = engine.runners[0].num_computed_tokens
    engine.add("second", PROMPT)
    engine.step()
    assert engine.stats.num_waiting_for_kv == 1
    assert not engine.scheduler.has_work()
    engine.run_all()
    assert engine.token_ids("second") == output(PROMPT, 4)
    assert engine.runners[0].num_computed_tokens == num_computed + 1 + 3
    assert engine.finished["second"].num_cached_tokens == 12
    # Of the sliding group only what the token after the prefix sees.
    (load,) = engine.loads
    assert [key.group for key in load.keys] == ([0, 0, 0] if len(groups) == 1 else [0, 0, 0, 1])
    stats = engine.stats
    sources = [
        stats.counts[f"prompt_tokens_cached_by_source/{name}"] for name in ("device", "host")
    ]
    assert sources == [0, 12]
    assert stats.counts["kv_offload_loaded_bytes"] == 100 * len(load.block_ids)


def test_choices_of_one_prompt_load_it_once() -> None:
    engine = engine_after_first(num_blocks=10, num_others=3)
    for choice in range(3):
        engine.add(f"second/{choice}", PROMPT)
    engine.run_all()
    assert len(engine.loads) == 1
    assert engine.finished.keys() >= {"second/0", "second/1", "second/2"}


def test_a_preempted_request_goes_on_from_the_host() -> None:
    engine = make_engine(num_blocks=8)
    engine.add("early", PROMPT[:7], max_tokens=20)
    engine.add("late", OTHER[:7], max_tokens=20)
    while not engine.stats.counts.get("num_preemptions"):
        engine.step()
        engine.end_jobs()
    engine.run_all()
    assert [job.direction for job in engine.loads] == ["load"]
    assert engine.token_ids("late") == output(OTHER[:7], 20)
    assert engine.token_ids("early") == output(PROMPT[:7], 20)
    # Without the host, late would have computed all its tokens twice.
    assert engine.runners[0].num_computed_tokens < 2 * (7 + 19) + 4


@pytest.mark.parametrize("num_bad", [0, 1])
def test_a_failed_load_is_computed_instead(num_bad: int) -> None:
    engine = engine_after_first(tp_size=2)
    engine.add("second", PROMPT)
    engine.step()
    (load,) = engine.jobs.values()
    engine.end_job(load.job_id, ok=False, num_bad=num_bad)
    engine.run_all()
    assert engine.token_ids("second") == output(PROMPT, 4)
    assert engine.finished["second"].num_cached_tokens == 0
    stats = engine.stats
    assert (stats.counts["kv_offload_load_failures"], stats.counts["kv_offload_bad_blocks"]) == (
        1,
        num_bad,
    )
    assert len(engine.loads) == 1


def test_blocks_are_not_reused_before_they_are_stored() -> None:
    """Nor is anyone preempted for their sake: the step waits for the copies, without turning in
    circles.
    """
    engine = make_engine(num_blocks=4)
    engine.add("first", PROMPT[:8], max_tokens=1)
    engine.run()
    assert engine.stats.num_free_blocks == 2
    engine.add("second", OTHER[:3], max_tokens=13)
    engine.run()
    assert len(engine.token_ids("second")) == 6, "two blocks hold eight tokens"
    assert not engine.scheduler.has_work()
    engine.run_all()
    assert engine.token_ids("second") == output(OTHER[:3], 13)
    assert engine.stats.counts.get("num_preemptions", 0) == 0
