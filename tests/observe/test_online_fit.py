from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.observe.online_fit import OnlineFit


def true_value(coefficients: tuple[float, float], feature: float) -> float:
    return coefficients[0] + coefficients[1] * feature


def learn(fit: OnlineFit, coefficients: tuple[float, float], count: int, noise: float) -> None:
    source = random.Random(7)
    for _ in range(count):
        feature = source.uniform(0, 500)
        value = true_value(coefficients, feature) * source.uniform(1 - noise, 1 + noise)
        fit.observe((1.0, feature), value)


def test_it_finds_what_few_measurements_say_and_follows_when_that_changes() -> None:
    fit = OnlineFit((0.0, 0.0), (1.0, 0.1))
    learn(fit, (0.005, 2e-5), 10, noise=0.0)
    assert fit.predict((1.0, 300)) == pytest.approx(0.011, rel=0.05)
    learn(fit, (0.005, 6e-5), 600, noise=0.1)
    assert fit.predict((1.0, 300)) == pytest.approx(0.023, rel=0.15)


def test_one_outlier_moves_it_little() -> None:
    fit = OnlineFit((0.0, 0.0), (1.0, 0.1))
    learn(fit, (0.005, 2e-5), 100, noise=0.05)
    before = fit.predict((1.0, 100))
    fit.observe((1.0, 100), 5.0)
    assert fit.predict((1.0, 100)) == pytest.approx(before, rel=0.1)


def test_what_no_measurement_speaks_of_stays() -> None:
    fit = OnlineFit((0.0, 0.25), (1.0, 0.1))
    for _ in range(1000):
        fit.observe((1.0, 0.0), 0.01)
    assert fit.coefficients[1] == 0.25


@pytest.mark.parametrize("seed", range(20))
def test_outliers_among_features_that_grow_together_do_not_stay(seed: int) -> None:
    """One stream after the other: a constant, the stream and its tokens are nearly the same."""
    source = random.Random(seed)
    fit = OnlineFit([0.0] * 3, (1.0, 0.1, 1e-4), (True, True, False))
    for number in (1, 8):
        fit.observe((1.0, number, 32 * number), 0.1 * source.uniform(1, 4))
    for number in range(95):
        outlier = source.choice([1, 1, 1, 1.3, 2, 3, 6, 20])
        fit.observe((1.0, 1, 256 + number), 0.07 * outlier)
    assert 0.05 < fit.predict((1.0, 1, 350)) < 0.3


def test_what_is_known_stays_when_another_coefficient_would_be_negative() -> None:
    """The steps of an engine: of one stream, then of 64, after a warm-up that said too much. The
    cost of a context is then below zero at first, and that of any step is known.
    """
    fit = OnlineFit([0.0] * 3, (1.0, 0.1, 1e-4), (True, True, False))
    fit.observe((1.0, 1, 32), 7.0e-3)
    fit.observe((1.0, 32, 1024), 8.5e-3)
    for number in range(250):
        fit.observe((1.0, 1, 512 + number), 4.67e-3)
    for number in range(40):
        fit.observe((1.0, 64, 64 * (512 + number)), 6.4e-3)
        assert fit.coefficients[0] == pytest.approx(4.65e-3, rel=0.05)
    assert fit.predict((1.0, 64, 64 * 600)) == pytest.approx(6.4e-3, rel=0.05)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e3)), max_size=60),
)
def test_nothing_makes_it_negative_or_infinite(measured: list[tuple[float, float]]) -> None:
    fit = OnlineFit((0.0, 0.0), (1.0, 0.1))
    for feature, value in measured:
        fit.observe((1.0, feature), value)
    assert all(0 <= coefficient < 1e9 for coefficient in fit.coefficients)
