"""The noise of draws: what it is a function of, and that it stays the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.sampler import draw_key, uniform_noise

PINNED = [0.684627267139, 0.141815423124, 0.440032018256, 0.962526909075, 0.428594958041]


def test_is_pinned() -> None:
    """Engines of different versions must draw the same: a change here breaks running
    deployments.
    """
    keys = [
        draw_key(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 3, 4))
    ]
    numbers = torch.tensor([0, 1, 49_151, -1, -2])
    assert [
        round(float(uniform_noise(torch.tensor([key]), numbers[at : at + 1])), 12)
        for at, key in enumerate(keys)
    ] == PINNED


def test_negative_seed_is_its_64_bits() -> None:
    assert draw_key(-1, 0, 0) == draw_key(2**64 - 1, 0, 0)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31))
def test_lies_between_0_and_1(key: int, number: int) -> None:
    arguments = (torch.tensor([key]), torch.tensor([number]))
    assert 0 < float(uniform_noise(*arguments)) < 1


def test_each_row_takes_numbers_of_its_own_or_shares_them() -> None:
    keys, numbers = torch.tensor([5, 6]), torch.arange(4)
    assert torch.equal(uniform_noise(keys, numbers), uniform_noise(keys, numbers.expand(2, -1)))


def test_is_uniform() -> None:
    """Mean and chi-square over 100 bins, along numbers and along keys; fixed seeds."""
    along_keys = torch.tensor(
        [draw_key(seed, 0, index) for seed in range(200) for index in range(100)]
    )
    for noise in (
        uniform_noise(along_keys[:1], torch.arange(20_000)),
        uniform_noise(along_keys, torch.tensor([7])),
    ):
        counts = torch.histc(noise, bins=100, min=0, max=1)
        assert abs(float(noise.mean()) - 0.5) < 0.01
        assert float(((counts - 200) ** 2 / 200).sum()) < 149, (
            "the 0.1 % quantile of 99 degrees of freedom"
        )
