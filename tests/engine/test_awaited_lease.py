"""A decode engine that knows of a prompt while prefill still computes it."""

from __future__ import annotations

from pdlaunch.protocol.kv_params import FirstToken
from pdlaunch.protocol.transfer import LeaseWatched, StartPull, UnwatchLease, WatchLease
from tests.engine.fake_engine import FakeEngine, remote_kv
from tests.engine.test_scheduler import PROMPT, output


def awaiting(max_tokens: int = 4, **fields: object) -> FakeEngine:
    engine = FakeEngine()
    engine.add("d", PROMPT, max_tokens=max_tokens, remote_kv=remote_kv("x", 0), awaits_lease=True, **fields)
    (command,) = engine.step().commands
    assert isinstance(command, WatchLease)
    assert command.remote.request_id == "x"
    assert not engine.scheduler.has_work()
    return engine


def watched(engine: FakeEngine, *token_ids: int, ok: bool = True) -> None:
    first_tokens = [FirstToken(token_id=token_id) for token_id in token_ids]
    engine.scheduler.on_transfer_event(LeaseWatched(request_id="d", ok=ok, first_tokens=first_tokens, error="" if ok else "gone"))
    engine.scheduler.check_integrity()
    engine.take_outputs()


def test_it_owns_no_block_before_the_lease_is_there() -> None:
    engine = awaiting()
    assert engine.scheduler.stats().num_free_blocks == engine.num_blocks
    assert engine.scheduler.stats().num_waiting_for_kv == 1


def test_it_pulls_and_goes_on_after_the_first_token() -> None:
    engine = awaiting()
    tokens = output(PROMPT, 4)
    watched(engine, tokens[0])
    assert engine.first_tokens["d"] == tokens[:1]
    (pull,) = engine.step().commands
    assert isinstance(pull, StartPull)
    engine.end_pull(pull.pull_id)
    engine.run()
    assert engine.token_ids("d") == tokens[1:]
    assert engine.finished["d"].num_cached_tokens == len(PROMPT)


def test_a_pull_that_fails_then_is_recomputed() -> None:
    engine = awaiting()
    tokens = output(PROMPT, 4)
    watched(engine, tokens[0])
    (pull,) = engine.step().commands
    assert isinstance(pull, StartPull)
    engine.end_pull(pull.pull_id, ok=False)
    engine.run()
    assert engine.token_ids("d") == tokens[1:]


def test_a_lease_that_does_not_come_ends_it_and_is_left_to_others() -> None:
    engine = awaiting()
    watched(engine, ok=False)
    assert "gone" in (engine.finished["d"].error or "")
    assert engine.finished["d"].error_param == "kv_transfer_params"
    assert engine.step().commands == []


def test_one_that_is_aborted_meanwhile_leaves_the_lease_to_others() -> None:
    engine = awaiting()
    engine.scheduler.abort("d")
    engine.take_outputs()
    assert engine.step().commands == [UnwatchLease(request_id="d")]
    watched(engine, 5)
    assert engine.finished["d"].reason == "abort"
    assert "d" not in engine.first_tokens


def test_a_first_token_that_is_the_last_one_needs_no_pull_but_ends_the_lease() -> None:
    engine = awaiting(max_tokens=1)
    watched(engine, 5)
    assert engine.finished["d"].reason == "length"
    assert engine.finished["d"].tokens == []
    (told,) = engine.step().commands
    assert isinstance(told, StartPull)
    assert told.block_ids == [[]]
