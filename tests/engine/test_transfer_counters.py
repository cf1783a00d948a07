"""What the scheduler counts of pulls, over all ranks."""

from __future__ import annotations

from pdlaunch.protocol.transfer import PullFinished
from tests.engine.fake_engine import FakeEngine, remote_kv


def pulling_engine() -> FakeEngine:
    engine = FakeEngine()
    engine.add("a", range(10), max_tokens=2, remote_kv=remote_kv("x", 10))
    engine.step()
    return engine


def finish(engine: FakeEngine, **fields: object) -> None:
    pull_id = next(iter(engine.pulls))
    del engine.pulls[pull_id]
    engine.scheduler.requests.on_transfer_event(PullFinished(pull_id=pull_id, **fields))  # type: ignore[arg-type]


def test_a_pull_that_failed_for_good() -> None:
    engine = pulling_engine()
    finish(engine, ok=False, num_retries=2, verification_failed=True, late=True)
    engine.run()
    stats = engine.scheduler.requests.stats()
    assert (
        stats.transfers,
        stats.transfer_failures,
        stats.pull_retries,
        stats.recomputed_requests,
    ) == (0, 1, 2, 1)
    assert (stats.verification_failures, stats.late_reads) == (1, 1)


def test_a_pull_that_succeeded_with_its_second_read() -> None:
    engine = pulling_engine()
    finish(engine, ok=True, num_retries=1, verification_failed=True)
    stats = engine.scheduler.requests.stats()
    assert (
        stats.transfers,
        stats.transfer_failures,
        stats.pull_retries,
        stats.verification_failures,
    ) == (1, 0, 1, 1)


def test_leases_count_as_expired_only_when_their_time_was_up() -> None:
    engine = FakeEngine()
    for request_id, reason in (
        ("a", "pulled"),
        ("b", "expired"),
        ("c", "released"),
        ("d", "expired"),
    ):
        engine.add(request_id, range(10), max_tokens=1, do_remote_decode=True)
        engine.run()
        engine.end_lease(request_id, reason)
    stats = engine.scheduler.requests.stats()
    assert (stats.leases_expired, stats.num_leased_requests, stats.num_free_blocks) == (2, 0, 32)
