"""A decode engine that knows of a prompt while prefill still computes it."""

from __future__ import annotations

import pytest

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.transfer import CancelPull, PullFinished, StartPull
from tests.engine.fake_engine import (
    FULL,
    PROMPT,
    FakeEngine,
    output,
    remote_kv,
    sliding,
    stop_at_first,
)


def await_lease(
    engine: FakeEngine, name: str = "d", prompt: list[int] = PROMPT, **fields: object
) -> None:
    engine.add(
        name, prompt, remote_kv=remote_kv(f"lease of {name}", 0), awaits_lease=True, **fields
    )  # type: ignore[arg-type]


def start_pull(
    engine: FakeEngine, name: str = "d", prompt: list[int] = PROMPT, **fields: object
) -> StartPull:
    await_lease(engine, name, prompt, **fields)
    (command,) = engine.step().commands
    assert isinstance(command, StartPull)
    assert command.awaits
    assert command.remote.lease_id == f"lease of {name}"
    return command


def test_its_pull_begins_at_once() -> None:
    engine = FakeEngine()
    pull = start_pull(engine)
    assert (pull.first_block_index, [len(ids) for ids in pull.block_ids], pull.num_tokens) == (
        [0],
        [3],
        10,
    )
    stats = engine.scheduler.requests.figures.stats()
    assert (stats.num_waiting_for_kv, stats.num_waiting, stats.num_free_blocks) == (1, 0, 29)
    assert not engine.scheduler.has_work()


def test_it_goes_on_after_the_first_token_that_the_lease_brings() -> None:
    engine = FakeEngine()
    engine.end_pull(start_pull(engine).pull_id)
    tokens = output(PROMPT, 4)
    assert engine.first_tokens["d"] == tokens[:1]
    engine.run()
    assert engine.token_ids("d") == tokens[1:]
    assert engine.finished["d"].num_cached_tokens == len(PROMPT)
    assert engine.runners[0].num_computed_tokens == 3, "no prompt token"


def test_a_window_is_that_of_the_token_after_the_prompt() -> None:
    engine = FakeEngine(groups=(FULL, sliding(3)))
    pull = start_pull(engine)
    assert (pull.first_block_index, [len(ids) for ids in pull.block_ids]) == ([0, 2], [3, 1])
    engine.end_pull(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(PROMPT, 4)[1:]


def test_with_everything_cached_it_still_waits_for_the_first_token() -> None:
    engine = FakeEngine()
    prompt = PROMPT[:8]
    engine.add("a", [*prompt, 1], max_tokens=1)
    engine.run()
    pull = start_pull(engine, prompt=prompt)
    assert (pull.first_block_index, pull.block_ids) == ([2], [[]])
    assert engine.scheduler.requests.figures.stats().num_waiting_for_kv == 1
    assert engine.scheduler.requests.figures.stats().num_free_blocks == 30
    engine.end_pull(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(prompt, 4)[1:]
    assert engine.finished["d"].num_cached_tokens == 8
    assert engine.scheduler.requests.figures.stats().transfers == 0


def test_what_the_host_has_is_not_pulled() -> None:
    engine = FakeEngine(num_blocks=8, num_chunks=100)
    engine.add("a", PROMPT, max_tokens=1)
    engine.run_all()
    engine.add("b", [6] * 28, max_tokens=1)
    engine.run_all()
    await_lease(engine)
    engine.step()
    assert engine.loads
    engine.end_jobs()
    (pull,) = engine.step().commands
    assert isinstance(pull, StartPull)
    assert pull.first_block_index == [2]
    engine.end_pull(pull.pull_id)
    engine.run_all()
    assert engine.token_ids("d") == output(PROMPT, 4)[1:]


def test_a_pull_that_fails_under_a_lease_is_recomputed() -> None:
    engine = FakeEngine()
    engine.end_pull(start_pull(engine).pull_id, ok=False)
    tokens = output(PROMPT, 4)
    assert engine.first_tokens["d"] == tokens[:1]
    engine.run()
    assert engine.token_ids("d") == tokens[1:]
    stats = engine.scheduler.requests.figures.stats()
    assert (stats.recomputed_requests, stats.transfer_failures) == (1, 1)


def test_a_pull_that_fails_under_a_lease_ends_it_where_so_set() -> None:
    engine = FakeEngine(kv_transfer=KVTransferSettings(on_failure="fail"))
    engine.end_pull(start_pull(engine).pull_id, ok=False)
    assert "could not be pulled: broken" in (engine.finished["d"].error or "")
    assert engine.finished["d"].error_param is None


@pytest.mark.parametrize("ok", [True, False])
def test_a_lease_that_does_not_come_ends_it_and_is_left_to_others(ok: bool) -> None:
    engine = FakeEngine()
    engine.end_pull(start_pull(engine).pull_id, ok=ok, leased=False)
    finished = engine.finished["d"]
    assert finished.reason == "error"
    assert "did not come" in (finished.error or "")
    assert ok or "broken" in (finished.error or "")
    assert finished.error_param == "kv_transfer_params"
    assert engine.step().commands == []
    stats = engine.scheduler.requests.figures.stats()
    assert (stats.num_free_blocks, stats.transfer_failures, stats.recomputed_requests) == (32, 0, 0)


def test_one_that_is_aborted_meanwhile_owns_no_more_than_its_pull() -> None:
    engine = FakeEngine()
    pull = start_pull(engine)
    engine.scheduler.requests.abort("d")
    engine.take_outputs()
    assert engine.finished["d"].reason == "abort"
    assert engine.step().commands == [CancelPull(pull_id=pull.pull_id)]
    assert engine.scheduler.requests.figures.stats().num_free_blocks == 29
    engine.end_pull(pull.pull_id, ok=False, leased=False)
    assert engine.scheduler.requests.figures.stats().num_free_blocks == 32
    assert engine.scheduler.requests.figures.stats().transfer_failures == 0
    assert "d" not in engine.first_tokens


def test_one_that_never_got_its_blocks_leaves_the_lease_to_others() -> None:
    engine = FakeEngine(num_blocks=6)
    first = start_pull(engine, "d")
    await_lease(engine, "late", [6] * 16)
    assert engine.step().commands == []
    assert engine.scheduler.requests.figures.stats().num_waiting == 1
    engine.scheduler.requests.abort("late")
    engine.take_outputs()
    assert engine.step().commands == []
    engine.end_pull(first.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(PROMPT, 4)[1:]


def test_one_that_is_refused_leaves_the_lease_to_others() -> None:
    engine = FakeEngine(num_blocks=2)
    await_lease(engine)
    assert engine.finished["d"].reason == "error"
    assert engine.step().commands == []


@pytest.mark.parametrize("ends", ["length", "stop"])
def test_a_first_token_that_is_the_last_one_leaves_the_blocks_to_the_cache(ends: str) -> None:
    engine = FakeEngine()
    pull = start_pull(
        engine, **({"max_tokens": 1} if ends == "length" else {"sampling": stop_at_first(PROMPT)})
    )
    engine.end_pull(pull.pull_id)
    finished = engine.finished["d"]
    assert (finished.reason, finished.tokens, finished.num_cached_tokens) == (ends, [], 10)
    assert engine.first_tokens["d"] == output(PROMPT, 1)
    assert engine.step().commands == []
    assert engine.scheduler.requests.figures.stats().num_free_blocks == 32
    engine.add("next", PROMPT, max_tokens=1)
    engine.run()
    assert engine.finished["next"].num_cached_tokens == 8


def test_running_requests_take_no_blocks_from_a_pull_that_waits() -> None:
    engine = FakeEngine(num_blocks=8, caching=False)
    for name in "ab":
        engine.add(name, [1, 2], max_tokens=14)
    engine.step()
    pull = start_pull(engine)
    for _ in range(20):
        engine.step()
    assert set(engine.finished) == {"a", "b"}
    assert engine.scheduler.requests.figures.stats().preemptions > 0
    engine.end_pull(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(PROMPT, 4)[1:]


def test_two_leases_of_one_prompt_are_two_pulls() -> None:
    engine = FakeEngine()
    await_lease(engine, "d")
    await_lease(engine, "e")
    engine.step()
    assert len(engine.pulls) == 2
    for pull_id in list(engine.pulls):
        engine.end_pull(pull_id)
    engine.run()
    assert engine.token_ids("d") == engine.token_ids("e") == output(PROMPT, 4)[1:]


def test_unknown_pulls_with_first_tokens_are_ignored() -> None:
    engine = FakeEngine()
    engine.scheduler.requests.on_transfer_event(PullFinished(pull_id="never", ok=True))
    assert engine.scheduler.requests.outputs.take() == []


def test_prompts_that_are_computed_elsewhere_leave_room_for_others() -> None:
    """At most half of the blocks wait for them: what is ready can be pulled meanwhile."""
    engine = FakeEngine(num_blocks=16)
    first = start_pull(engine, "a")
    second = start_pull(engine, "b")
    await_lease(engine, "c")
    assert engine.step().commands == []
    assert engine.scheduler.requests.figures.stats().num_waiting == 1
    engine.add("d", PROMPT, remote_kv=remote_kv("ready", 0))
    (pull,) = [command for command in engine.step().commands if isinstance(command, StartPull)]
    assert pull.remote.lease_id == "ready"
    engine.end_pull(first.pull_id)
    (third,) = [command for command in engine.step().commands if isinstance(command, StartPull)]
    assert third.remote.lease_id == "lease of c"
    for ended in (second, pull, third):
        engine.end_pull(ended.pull_id)
    engine.run()
    assert {engine.finished[name].reason for name in "abcd"} == {"length"}


def test_one_prompt_may_have_more_than_half() -> None:
    engine = FakeEngine(num_blocks=16)
    prompt = [5] * 40
    pull = start_pull(engine, prompt=prompt)
    assert sum(map(len, pull.block_ids)) > 8
