"""The KV cache of ranks that take what a GPU has left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.runner import left_for_cache

GIB = 1 << 30
TOTAL, CONTEXT, WEIGHTS, ACTIVATIONS = 140 * GIB, GIB // 2, 16 * GIB, 5 * GIB


def start(used: int, utilization: float) -> int:
    """Return the KV cache of a rank that starts where ``used`` bytes are held already."""
    return left_for_cache(
        free_bytes=TOTAL - used - CONTEXT - WEIGHTS,
        total_bytes=TOTAL,
        own_bytes=WEIGHTS,
        utilization=utilization,
        activation_bytes=ACTIVATIONS,
    )


def test_two_ranks_on_one_gpu_have_equal_caches() -> None:
    first = start(0, 0.45)
    assert start(CONTEXT + WEIGHTS + first + ACTIVATIONS, 0.45) == first > 40 * GIB


def test_what_others_hold_cannot_be_had() -> None:
    held = 60 * GIB
    assert 50 * GIB < start(held, 0.9) < TOTAL - held - CONTEXT - WEIGHTS - ACTIVATIONS
    assert start(TOTAL - WEIGHTS - CONTEXT, 0.9) == 0


@given(st.integers(0, TOTAL - CONTEXT - WEIGHTS), st.floats(0.01, 1))
def test_a_rank_stays_within_its_budget_and_the_device(used: int, utilization: float) -> None:
    cache = start(used, utilization)
    assert cache >= 0
    if cache:
        assert WEIGHTS + ACTIVATIONS + cache <= utilization * TOTAL
        assert used + CONTEXT + WEIGHTS + ACTIVATIONS + cache <= TOTAL
