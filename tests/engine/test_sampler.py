"""Drawing tokens: against a slow reference, and the promises of seeds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.rows import Row, new_row
from pdlaunch.engine.sampler import (
    GROUP_TOKENS,
    draw_key,
    draw_tokens,
    nucleus_edges,
    uniform_noise,
)
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput

VOCAB_SIZE = 50


def row(prompt: list[int], output: list[int], **sampling: object) -> Row:
    params = SamplingParams(**({"max_tokens": 99} | sampling))  # type: ignore[arg-type]
    return new_row(np.zeros(200, np.int64), prompt + output, len(prompt), params)


def random_logits(seed: int, num_rows: int = 1, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(logits: torch.Tensor, rows: list[Row]) -> list[TokenOutput]:
    tokens = [token for token in draw_tokens(logits, rows).collect() if token is not None]
    assert len(tokens) == len(rows)
    return tokens


def draw_one(logits: torch.Tensor, one: Row) -> int:
    return drawn(logits, [one])[0].token_id


def gumbel(key: int, number: int) -> float:
    """The noise in Python's integers and floats."""
    mixed = (key + number * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    mixed ^= mixed >> 31
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return -math.log(-math.log(((signed >> 12) + 0.5) / 2**52 + 0.5))


def log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf


def reference(logits: list[float], one: Row) -> int:
    """The documented order of steps, one token at a time, in Python floats."""
    sampling, values = one.sampling, list(logits)
    output = one.output.tolist()
    for token_id, bias in sampling.logit_bias.items():
        values[token_id] += bias
    if len(output) < sampling.min_tokens:
        for token_id in {*sampling.eos_token_ids, *sampling.stop_token_ids}:
            values[token_id] = -math.inf
    penalty = sampling.repetition_penalty
    for token_id in {*one.known.tolist()}:
        values[token_id] *= 1 / penalty if values[token_id] > 0 else penalty
    for token_id in set(output):
        num_seen = output.count(token_id)
        values[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * num_seen
    if sampling.temperature == 0:
        return values.index(max(values))
    scaled = [value / sampling.temperature for value in values]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if sampling.top_k:
        least = sorted(weights)[-sampling.top_k :][0]
        weights = [weight if weight >= least else 0.0 for weight in weights]
    if sampling.top_p < 1:
        total, least = 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            total, least = total + weight, weight
            if total >= sampling.top_p * sum(weights):
                break
        weights = [weight if weight >= least else 0.0 for weight in weights]
    key = draw_key(sampling.seed, sampling.choice, len(output))
    groups = [weights[at : at + GROUP_TOKENS] for at in range(0, len(weights), GROUP_TOKENS)]
    noisy = [log(sum(group)) + gumbel(key, at - len(groups)) for at, group in enumerate(groups)]
    chosen = noisy.index(max(noisy))
    noisy = [log(weight) + gumbel(key, at) for at, weight in enumerate(groups[chosen])]
    return chosen * GROUP_TOKENS + noisy.index(max(noisy))


token_ids = st.integers(0, VOCAB_SIZE - 1)
history = st.lists(token_ids, max_size=6)


def rows_with(params: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[Row]:
    return st.builds(
        lambda prompt, output, found: row([*prompt, 0], output, **found), history, history, params
    )


sample_rows = rows_with(
    st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.9])},
        optional={
            "top_k": st.integers(0, VOCAB_SIZE + 5),
            "top_p": st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0]),
            "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
            "presence_penalty": st.sampled_from([0.0, 1.5, -1.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.7, -0.7]),
            "repetition_penalty": st.sampled_from([1.0, 1.4, 0.6]),
            "logit_bias": st.dictionaries(
                token_ids, st.sampled_from([-50.0, -3.0, 2.0]), max_size=4
            ),
            "min_tokens": st.integers(0, 3),
            "eos_token_ids": st.tuples(token_ids),
            "stop_token_ids": st.tuples(token_ids, token_ids),
            "seed": st.integers(0, 2**64 - 1),
            "choice": st.integers(0, 7),
        },
    )
)


@settings(max_examples=150, deadline=None)
@given(st.lists(sample_rows, min_size=1, max_size=4), st.integers(0, 2**31))
def test_equals_reference(rows: list[Row], seed: int) -> None:
    logits = random_logits(seed, len(rows))
    before = logits.clone()
    found = [token.token_id for token in drawn(logits, rows)]
    assert found == list(map(reference, logits.double().tolist(), rows))
    assert torch.equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws over 700 tokens in three groups; fixed seeds, so the bound (0.1 %)
    cannot fail by chance.
    """
    logits = random_logits(12, 1, 700) / 3
    num_draws = 40_000
    rows = [
        row([1], [0] * (seed % 7), seed=seed // 7, choice=seed % 3) for seed in range(num_draws)
    ]
    found = torch.cat(
        [
            draw_tokens(logits.expand(1000, -1), rows[at : at + 1000]).token_ids
            for at in range(0, num_draws, 1000)
        ]
    )
    expected = logits[0].double().softmax(-1) * num_draws
    assert expected.min() > 1
    chi_square = float(((torch.bincount(found, minlength=700) - expected) ** 2 / expected).sum())
    assert chi_square < 699 + 3.09 * math.sqrt(2 * 699) + 10


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(8)
    expected = logits[0].log_softmax(-1)
    changes = {"temperature": 0.2, "repetition_penalty": 1.9, "top_k": 3, "logit_bias": {7: 90.0}}
    token = drawn(logits, [row([1, 2], [3, 3], num_top_logprobs=4, **changes)])[0]
    assert token.token_id == 7
    assert token.logprob == pytest.approx(float(expected[7]))
    best = expected.topk(4)
    assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist())


def test_edges_do_not_depend_on_how_many_are_sorted_at_first() -> None:
    probabilities, wanted = random_logits(1, 5, 700).softmax(-1), [0.1, 0.5, 0.9, 0.999, 1.0]
    whole = nucleus_edges(probabilities, wanted, 700)
    assert torch.equal(nucleus_edges(probabilities, wanted, 16), whole)


_SIZES = [0.0, 1e-45, 1e-38, 88.0, 65_504.0, 3.38e38, math.inf]
EXTREMES = [*_SIZES, *(-size for size in _SIZES)]
extreme_rows = rows_with(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 5e-324, 1e-38, 1e-5, 0.01, 1.0, 2.0]),
            "top_k": st.sampled_from([0, 1, 3, VOCAB_SIZE, 2**31 - 1]),
            "top_p": st.sampled_from([5e-324, 1e-38, 0.5, math.nextafter(1.0, 0.0), 1.0]),
            "min_p": st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
            "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
            "frequency_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
            "repetition_penalty": st.sampled_from([5e-324, 1e-300, 1e-38, 1.0, 1e38, 1.7e308]),
            "logit_bias": st.dictionaries(
                token_ids, st.sampled_from([-100.0, 5e-324, 100.0]), max_size=3
            ),
            "min_tokens": st.sampled_from([0, 7]),
            "eos_token_ids": st.just((0,)),
            "stop_token_ids": st.sampled_from([(), (1, 2), tuple(range(VOCAB_SIZE))]),
            "seed": st.sampled_from([0, 2**63 - 1]),
            "num_top_logprobs": st.sampled_from([None, 0, 20]),
        }
    )
)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(extreme_rows, min_size=1, max_size=3),
    st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.randoms(use_true_random=False),
)
def test_any_parameters_draw_a_token_of_the_vocabulary(
    rows: list[Row], values: list[float], dtype: torch.dtype, pick
) -> None:
    logits = torch.tensor([[pick.choice(values) for _ in range(VOCAB_SIZE)] for _ in rows])
    result = draw_tokens(logits.to(dtype), rows)
    for token in result.collect():
        assert token is not None
        assert 0 <= token.token_id < VOCAB_SIZE
        told = [token.logprob or 0.0, *(value for _, value in token.top_logprobs)]
        assert all(-9999.0 <= value <= 0.0 for value in told)
    assert bool(((result.token_ids >= 0) & (result.token_ids < VOCAB_SIZE)).all())


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.0, "min_tokens": 3}, {}, {"top_p": 0.5}]
)
def test_row_with_nan_draws_nothing_and_others_are_not_touched(sampling: dict[str, object]) -> None:
    rows = [row([1], [], **sampling, num_top_logprobs=num_top) for num_top in (None, 2, None)]
    logits = random_logits(7, 3)
    alone = drawn(logits[2:], rows[2:])
    logits[0, 13] = math.nan
    logits[1] = math.nan
    result = draw_tokens(logits, rows)
    assert result.collect() == [None, None, *alone]
    assert result.token_ids.tolist()[:2] == [0, 0], "what the device goes on with is a token"


def test_low_temperatures_are_those_of_vllm() -> None:
    """Lower ones than 0.01 but 0 are taken as 0.01."""
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 0.005
    low, least = (
        [draw_one(logits, row([1], [], temperature=value, seed=seed)) for seed in range(50)]
        for value in (1e-9, 0.01)
    )
    assert low == least
    assert len({*low}) > 1
    assert draw_one(logits, row([1], [], temperature=0.0)) == 3


# Noise


def test_noise_is_pinned() -> None:
    """Engines of different versions must draw the same: a change here breaks running
    deployments.
    """
    seeds = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 3, 4))
    numbers = torch.tensor([0, 1, 49_151, -1, -2])[:, None]
    noise = uniform_noise(torch.tensor([draw_key(*seed) for seed in seeds]), numbers)
    assert [round(value, 12) for value in noise[:, 0].tolist()] == [
        0.684627267139,
        0.141815423124,
        0.440032018256,
        0.962526909075,
        0.428594958041,
    ]
    assert draw_key(-1, 0, 0) == draw_key(2**64 - 1, 0, 0)
