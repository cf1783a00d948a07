"""The life of requests: how they end, what they lease and pull, and what is counted of them."""

import itertools

import pytest

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.lifecycle import Histograms
from pdlaunch.protocol.transfer import CancelPull, EndLease, PullFinished, StartPull
from tests.engine.fake_engine import PROMPT, FakeEngine, output, remote_kv, stop_at_first

# How requests end


@pytest.mark.parametrize(
    ("num_blocks", "prompt_len", "max_tokens", "number"),
    [(20, 64, 1, "64 fit with the output"), (10, 44, 1, "41 fit with the output")],
)
def test_what_can_never_fit_ends_at_once_with_both_numbers(
    num_blocks: int, prompt_len: int, max_tokens: int, number: str
) -> None:
    engine = FakeEngine(num_blocks=num_blocks)
    engine.add("a", range(prompt_len), max_tokens=max_tokens)
    assert engine.finished["a"].reason == "error"
    assert number in (engine.finished["a"].error or "")
    assert not engine.step().scheduled


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_an_answer_ends_where_the_kv_cache_does(runs_ahead: bool) -> None:
    engine = FakeEngine(num_blocks=10, runs_ahead=runs_ahead)
    engine.add("a", range(10), max_tokens=1000)
    engine.run()
    assert (engine.finished["a"].reason, len(engine.token_ids("a"))) == ("length", 31)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_request_whose_logits_are_nan_ends_with_an_error_and_others_go_on(runs_ahead: bool) -> None:
    engine = FakeEngine(runs_ahead=runs_ahead)
    engine.runners[0].nan_after = 6
    prompts = {"before": [1, 2, 3], "sick": [6, 2, 3, 4], "after": [2, 2, 3]}
    for name, prompt in prompts.items():
        engine.add(name, prompt, max_tokens=8)
        engine.step()
    engine.run()
    sick = engine.finished["sick"]
    assert (sick.reason, sick.tokens, "NaN" in (sick.error or "")) == ("error", [], True)
    for name in ("before", "after"):
        assert engine.token_ids(name) == output(prompts[name], 8)
    assert engine.stats.num_free_blocks == engine.num_blocks


# Leases


@pytest.mark.parametrize(("num_readers", "has_lease"), [(1, False), (3, True)])
def test_a_choice_that_stops_leases_only_for_others(num_readers: int, has_lease: bool) -> None:
    engine = FakeEngine()
    stop = stop_at_first(PROMPT, 1)
    engine.add("a", PROMPT, sampling=stop, do_remote_decode=True, num_readers=num_readers)
    engine.run()
    assert ("a" in engine.leases) == has_lease
    assert engine.finished["a"].reason == "stop"
    assert (engine.finished["a"].remote_kv is not None) == has_lease
    engine.scheduler.requests.abort("a")
    assert (EndLease(lease_id="a") in engine.step().commands) == has_lease
    assert engine.stats.num_leased_requests == has_lease, "until the transfer thread says so"


def test_leases_count_as_expired_only_when_their_time_was_up() -> None:
    engine = FakeEngine()
    for name, reason in zip("abcd", ("pulled", "expired", "released", "expired"), strict=True):
        engine.add(name, PROMPT, max_tokens=1, do_remote_decode=True)
        engine.run()
        engine.end_lease(name, reason)
    stats = engine.stats
    assert stats.counts["kv_leases_expired"] == 2
    assert (stats.num_leased_requests, stats.num_free_blocks) == (0, 32)


# Pulls


def start_pull(engine: FakeEngine, **fields: object) -> StartPull:
    engine.add("d", PROMPT, **{"remote_kv": remote_kv("x", 10), **fields})  # type: ignore[arg-type]
    (command,) = engine.step().commands
    assert isinstance(command, StartPull)
    return command


def test_pulled_with_first_token_computes_no_prompt_token() -> None:
    engine = FakeEngine()
    pull = start_pull(engine, output=output(PROMPT, 1))
    assert (pull.first_block_index, len(pull.block_ids[0]), len(pull.block_hashes)) == ([0], 3, 3)
    assert engine.stats.num_waiting_for_kv == 1
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


def test_choices_share_one_pull_and_bring_only_the_partial_block_themselves() -> None:
    engine = FakeEngine()
    for choice in range(3):
        engine.add(f"d/{choice}", PROMPT, remote_kv=remote_kv("x", 10))
    starts = []
    engine.step()
    while engine.pulls:
        (pull,) = engine.pulls.values()
        starts.append(pull.first_block_index)
        engine.end_pull(pull.pull_id)
        engine.run()
    assert starts == [[0], [2], [2]]
    for choice in range(3):
        assert engine.token_ids(f"d/{choice}") == output(PROMPT, 4)


def test_on_failure_fail_answers_the_cause() -> None:
    engine = FakeEngine(kv_transfer=KVTransferSettings(on_failure="fail"))
    engine.end_pull(start_pull(engine).pull_id, ok=False)
    assert engine.finished["d"].reason == "error"
    assert "broken" in (engine.finished["d"].error or "")


def test_abort_while_pulling_answers_at_once_and_leaves_the_blocks_to_the_pull() -> None:
    engine = FakeEngine()
    pull = start_pull(engine)
    engine.scheduler.requests.abort("d")
    engine.take_outputs()
    assert engine.finished["d"].reason == "abort"
    assert engine.step().commands == [CancelPull(pull_id=pull.pull_id)]
    assert engine.stats.num_free_blocks == 29
    engine.end_pull(pull.pull_id)
    assert engine.stats.num_free_blocks == 32


# Counts


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"ok": False, "num_bytes": 9}, {"kv_transfer_failures": 1}),
        (
            {"ok": True, "num_bytes": 7, "seconds": 2},
            {"kv_transfers": 1, "kv_transfer_bytes": 7, "kv_transfer_seconds": 2},
        ),
    ],
)
def test_what_is_counted_of_a_pull(fields: dict[str, int], counts: dict[str, int]) -> None:
    engine, of_ranks = FakeEngine(), {"kv_pull_retries": 2, "kv_late_reads": 1}
    pull_id = start_pull(engine).pull_id
    event = PullFinished(pull_id=pull_id, counts=of_ranks, **fields)  # type: ignore[arg-type]
    engine.scheduler.requests.on_transfer_event(event)
    found = engine.stats.counts
    recomputed = {} if event.ok else {"kv_recomputed_requests": 1}
    assert {name: found[name] for name in found if name.startswith("kv_")} == (
        counts | of_ranks | recomputed
    )


def test_the_phases_of_a_request_add_up() -> None:
    engine, clock = FakeEngine(max_num_seqs=1), itertools.count(1.0)
    engine.scheduler.requests.histograms = histograms = Histograms(clock.__next__)
    engine.add("a", range(6), max_tokens=3)
    engine.run()
    shown = {series.name.removeprefix("request_"): series for series in histograms.shown()}
    # The clock was looked at on arrival, in the batch, and for each of three tokens.
    assert {name: series.sum for name, series in shown.items()} == {
        "queue_time_seconds": 1,
        "prefill_time_seconds": 1,
        "decode_time_seconds": 2,
        "inference_time_seconds": 3,
        "time_per_output_token_seconds": 1,
        "iteration_tokens_total": 6 + 2,
    }
    engine.add("never ran", range(6))
    engine.scheduler.requests.abort("never ran")
    assert sum(shown["queue_time_seconds"].counts) == 1
