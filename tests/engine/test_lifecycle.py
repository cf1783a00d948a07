"""The life of requests: how they end, what they lease, what they pull."""

from __future__ import annotations

import pytest

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.transfer import CancelPull, EndLease, GrantLease, StartPull
from tests.engine.fake_engine import (
    PROMPT,
    FakeEngine,
    output,
    remote_kv,
    stop_at_first,
)

# How requests end


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "number"),
    [(64, 1, "max_model_len is 64"), (40, 20, "need 15 KV blocks, the engine has 14")],
)
def test_what_can_never_fit_ends_at_once_with_both_numbers(
    prompt_len: int, max_tokens: int, number: str
) -> None:
    engine = FakeEngine(num_blocks=14)
    engine.add("a", range(prompt_len), max_tokens=max_tokens)
    finished = engine.finished["a"]
    assert finished.reason == "error"
    assert number in (finished.error or "")
    assert not engine.step().scheduled


def test_stop_token_waits_for_min_tokens() -> None:
    stop = tuple(range(7))
    engine = FakeEngine()
    engine.add("a", [1], sampling=SamplingParams(max_tokens=9, stop_token_ids=stop))
    engine.run()
    assert engine.finished["a"].stop_token_id == output([1], 1)[0]
    engine.add(
        "b",
        [1],
        sampling=SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=(output([1], 5)[0],)),
    )
    engine.run()
    assert len(engine.outputs["b"]) >= 4


def test_abort_ends_a_request_once_wherever_it_is() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.add("running", PROMPT, max_tokens=9)
    engine.add("waiting", PROMPT)
    engine.step()
    for _ in range(2):
        for name in ("running", "waiting", "unknown"):
            engine.scheduler.requests.abort(name)
    engine.take_outputs()
    assert {name: finished.reason for name, finished in engine.finished.items()} == {
        "running": "abort",
        "waiting": "abort",
    }
    engine.run()
    assert engine.scheduler.requests.stats().num_free_blocks == 32


def test_abort_all_ends_everything() -> None:
    engine = FakeEngine()
    engine.add("a", PROMPT)
    engine.add("b", PROMPT, remote_kv=remote_kv("x", 10))
    engine.step()
    engine.scheduler.requests.abort_all()
    engine.take_outputs()
    assert set(engine.finished) == {"a", "b"}


def test_a_second_request_under_a_living_id_is_dropped() -> None:
    engine = FakeEngine()
    engine.add("a", PROMPT, max_tokens=2)
    engine.scheduler.requests.add(engine.added["a"])
    engine.run()
    assert engine.token_ids("a") == output(PROMPT, 2)


@pytest.mark.parametrize("num_known", [1, 3, 4])
def test_resumed_tokens_count_but_are_not_sent_again(num_known: int) -> None:
    known = output(PROMPT, 4)
    engine = FakeEngine()
    engine.add("a", PROMPT, max_tokens=4, output=known[:num_known])
    engine.run()
    assert engine.token_ids("a") == known[num_known:]
    assert engine.finished["a"].reason == "length"


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_request_whose_logits_are_nan_ends_with_an_error_and_others_go_on(runs_ahead: bool) -> None:
    engine = FakeEngine(runs_ahead=runs_ahead)
    engine.runners[0].nan_after = 6
    engine.add("before", [1, 2, 3], max_tokens=8)
    engine.step()
    engine.add("sick", [6, 2, 3, 4], max_tokens=8)
    engine.add("after", [2, 2, 3], max_tokens=8)
    engine.run()
    sick = engine.finished["sick"]
    assert (sick.reason, sick.tokens) == ("error", [])
    assert sick.error is not None
    assert "NaN" in sick.error
    assert engine.token_ids("before") == output([1, 2, 3], 8)
    assert engine.token_ids("after") == output([2, 2, 3], 8)
    assert engine.scheduler.requests.stats().num_free_blocks == engine.num_blocks


# Lease


def lease_of(engine: FakeEngine, **fields: object) -> GrantLease | None:
    engine.add("a", PROMPT, **{"max_tokens": 1, "do_remote_decode": True, **fields})  # type: ignore[arg-type]
    return next(
        (
            command
            for plan in engine.run()
            for command in plan.commands
            if isinstance(command, GrantLease)
        ),
        None,
    )


def test_lease_and_answer_after_the_first_token() -> None:
    engine = FakeEngine()
    grant = lease_of(engine)
    finished = engine.finished["a"]
    assert grant is not None
    assert finished.remote_kv is not None
    assert (finished.reason, finished.remote_kv.engine_id, finished.remote_kv.num_tokens) == (
        "length",
        "local-engine",
        10,
    )
    assert finished.remote_kv.block_ids == grant.block_ids
    stats = engine.scheduler.requests.stats()
    assert (stats.num_leased_requests, stats.num_leased_blocks, stats.num_free_blocks) == (1, 3, 29)
    engine.end_lease("a", "expired")
    stats = engine.scheduler.requests.stats()
    assert (stats.num_leased_requests, stats.num_free_blocks, stats.leases_expired) == (0, 32, 1)


def test_no_lease_for_a_choice_that_is_complete() -> None:
    engine = FakeEngine()
    assert lease_of(engine, sampling=stop_at_first(PROMPT, 1)) is None
    assert (engine.finished["a"].reason, engine.finished["a"].remote_kv) == ("stop", None)


def test_lease_for_other_choices_and_its_end_by_the_server() -> None:
    engine = FakeEngine()
    assert lease_of(engine, sampling=stop_at_first(PROMPT, 1), num_readers=3) is not None
    assert engine.finished["a"].remote_kv is not None
    engine.scheduler.requests.abort("a")
    plan = engine.step()
    assert EndLease(lease_id="a") in plan.commands
    assert engine.scheduler.requests.stats().num_leased_requests == 1


def test_a_lease_keeps_its_id_from_another_lease() -> None:
    engine = FakeEngine()
    lease_of(engine)
    engine.added.clear()
    engine.finished.clear()
    engine.add("a", PROMPT, max_tokens=1, do_remote_decode=True)
    assert "lease" in (engine.finished["a"].error or "")


# Pull


def start_pull(engine: FakeEngine, **fields: object) -> StartPull:
    engine.add("d", PROMPT, **{"remote_kv": remote_kv("x", 10), **fields})  # type: ignore[arg-type]
    (command,) = engine.step().commands
    assert isinstance(command, StartPull)
    return command


def test_pulled_with_first_token_computes_no_prompt_token() -> None:
    engine = FakeEngine()
    pull = start_pull(engine, output=output(PROMPT, 1))
    assert (
        pull.first_block_index,
        [len(ids) for ids in pull.block_ids],
        len(pull.block_hashes),
    ) == ([0], [3], 3)
    assert engine.scheduler.requests.stats().num_waiting_for_kv == 1
    assert not engine.scheduler.has_work()
    engine.end_pull(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(PROMPT, 4)[1:]
    assert engine.finished["d"].num_cached_tokens == 10
    assert engine.runners[0].num_computed_tokens == 3


def test_a_request_with_everything_cached_still_tells_the_holder() -> None:
    engine = FakeEngine()
    prompt = PROMPT[:8]
    engine.add("a", [*prompt, 1], max_tokens=1)
    engine.run()
    engine.add("d", prompt, output=output(prompt, 1), remote_kv=remote_kv("x", 8))
    pull = engine.step().commands[0]
    assert isinstance(pull, StartPull)
    assert (pull.first_block_index, pull.block_ids) == ([2], [[]])
    engine.run()
    assert engine.finished["d"].reason == "length"
    engine.end_pull(pull.pull_id)


def test_choices_share_one_pull_and_bring_only_the_partial_block_themselves() -> None:
    engine = FakeEngine()
    for choice in range(3):
        engine.add(f"d/{choice}", PROMPT, remote_kv=remote_kv("x", 10))
    (first,) = engine.step().commands
    assert isinstance(first, StartPull)
    engine.end_pull(first.pull_id)
    engine.run()
    second = next(iter(engine.pulls.values()))
    assert second.first_block_index == [2]
    engine.end_pull(second.pull_id)
    engine.run()
    engine.end_pull(next(iter(engine.pulls)))
    engine.run()
    assert engine.num_pulls == 3
    assert {tuple(engine.token_ids(f"d/{choice}")) for choice in range(3)} == {
        tuple(output(PROMPT, 4))
    }


def test_a_prompt_whose_pull_failed_is_recomputed() -> None:
    """The ranks have tried again as often as they may."""
    engine = FakeEngine(kv_transfer=KVTransferSettings(pull_attempts=3))
    pull = start_pull(engine)
    assert pull.num_attempts == 3
    engine.end_pull(pull.pull_id, ok=False)
    engine.run()
    assert engine.num_pulls == 1
    assert engine.token_ids("d") == output(PROMPT, 4)
    stats = engine.scheduler.requests.stats()
    assert (stats.recomputed_requests, stats.transfer_failures, stats.transfers) == (1, 1, 0)


def test_on_failure_fail_answers_the_cause() -> None:
    engine = FakeEngine(kv_transfer=KVTransferSettings(on_failure="fail"))
    engine.end_pull(start_pull(engine).pull_id, ok=False)
    assert engine.finished["d"].reason == "error"
    assert "broken" in (engine.finished["d"].error or "")


def test_blocks_of_a_stalled_read_are_quarantined_until_drained() -> None:
    engine = FakeEngine(num_blocks=6)
    pull = start_pull(engine)
    engine.end_pull(pull.pull_id, ok=False, in_flight=True)
    assert engine.scheduler.requests.stats().num_quarantined_blocks == 3
    engine.run()
    assert "d" not in engine.finished
    engine.drain(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == output(PROMPT, 4)
    assert engine.scheduler.requests.stats().num_free_blocks == 6


def test_abort_while_pulling_answers_at_once_and_leaves_the_blocks_to_the_pull() -> None:
    engine = FakeEngine()
    pull = start_pull(engine)
    engine.scheduler.requests.abort("d")
    engine.take_outputs()
    assert engine.finished["d"].reason == "abort"
    assert engine.step().commands == [CancelPull(pull_id=pull.pull_id)]
    assert engine.scheduler.requests.stats().num_free_blocks == 29
    engine.end_pull(pull.pull_id)
    assert engine.scheduler.requests.stats().num_free_blocks == 32


def test_abort_before_the_pull_tells_the_holder() -> None:
    engine = FakeEngine()
    engine.add("d", PROMPT, remote_kv=remote_kv("x", 10))
    engine.scheduler.requests.abort("d")
    (command,) = engine.step().commands
    assert isinstance(command, StartPull)
    assert command.block_ids == [[]]
