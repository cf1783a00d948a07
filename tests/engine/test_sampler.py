"""Drawing tokens: against a slow reference, and the promises of seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.rows import Row, new_row
from pdlaunch.engine.sampler import (
    GROUP_TOKENS,
    draw_by_noise,
    draw_key,
    draw_tokens,
    nucleus_edge,
    nucleus_edges,
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


def reference(logits: list[float], one: Row) -> int:
    """The documented order of steps, one token at a time, in Python floats."""
    sampling, values = one.sampling, list(logits)
    output, seen = one.output.tolist(), set(one.known.tolist())
    for token_id, bias in sampling.logit_bias.items():
        values[token_id] += bias
    if len(output) < sampling.min_tokens:
        for token_id in {*sampling.eos_token_ids, *sampling.stop_token_ids}:
            values[token_id] = -math.inf
    for token_id in seen:
        penalty = sampling.repetition_penalty
        values[token_id] = (
            values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
        )
    for token_id in set(output):
        values[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(
            token_id
        )
    if sampling.temperature == 0:
        return max(range(len(values)), key=lambda token_id: values[token_id])
    scaled = [value / sampling.temperature for value in values]
    best = max(scaled)
    weights = [math.exp(value - best) for value in scaled]
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
    groups = [
        range(start, min(start + GROUP_TOKENS, len(weights)))
        for start in range(0, len(weights), GROUP_TOKENS)
    ]
    sums = [sum(weights[token_id] for token_id in group) for group in groups]
    group = groups[
        max(
            range(len(groups)),
            key=lambda number: log(sums[number]) + gumbel(key, number - len(groups)),
        )
    ]
    return max(
        group, key=lambda token_id: log(weights[token_id]) + gumbel(key, token_id - group.start)
    )


def log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf


token_ids = st.integers(0, VOCAB_SIZE - 1)
sampling_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.9]),
        "top_k": st.integers(0, VOCAB_SIZE + 5),
        "top_p": st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.4, 0.6]),
        "logit_bias": st.dictionaries(token_ids, st.sampled_from([-50.0, -3.0, 2.0]), max_size=4),
        "min_tokens": st.integers(0, 3),
        "eos_token_ids": st.tuples(token_ids),
        "stop_token_ids": st.tuples(token_ids, token_ids),
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 7),
    },
)
history = st.lists(token_ids, max_size=6)
sample_rows = st.builds(
    lambda prompt, output, params: row([*prompt, 0], output, **({"temperature": 1.0} | params)),
    history,
    history,
    sampling_params,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(sample_rows, min_size=1, max_size=4), st.integers(0, 2**31))
def test_equals_reference(rows: list[Row], seed: int) -> None:
    logits = random_logits(seed, len(rows))
    before = logits.clone()
    found = [token.token_id for token in drawn(logits, rows)]
    assert found == [
        reference(values, one) for values, one in zip(logits.double().tolist(), rows, strict=True)
    ]
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


def test_rounding_errors_hardly_ever_move_a_draw() -> None:
    """Beside the inverse of the cumulative distribution, under which each error moves the borders
    of all tokens.
    """
    source = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 8192, generator=source)
    rounded = logits + torch.randn(1, 8192, generator=source) * 1e-3
    keys = torch.randint(-(2**63), 2**63 - 1, (2048,), generator=source)
    drawn_twice = [
        torch.cat(
            [
                draw_by_noise((values - values.max()).expand(len(part), -1), part)
                for part in keys.split(64)
            ]
        )
        for values in (logits, rounded)
    ]
    targets = torch.rand(2048, dtype=torch.float64, generator=source)
    inverted_twice = [
        torch.searchsorted(values.double().softmax(-1).cumsum(-1)[0], targets)
        for values in (logits, rounded)
    ]
    num_moved = int((drawn_twice[0] != drawn_twice[1]).sum())
    assert num_moved <= 5
    assert int((inverted_twice[0] != inverted_twice[1]).sum()) > 5 * num_moved
    assert len(drawn_twice[0].unique()) > 1000


def test_draw_does_not_depend_on_the_batch() -> None:
    logits = random_logits(5, 6)
    rows = [row([1], [2] * index, seed=9, choice=index, top_p=0.9, top_k=20) for index in range(6)]
    together = [token.token_id for token in drawn(logits, rows)]
    assert together == [draw_one(logits[index : index + 1], rows[index]) for index in range(6)]


def test_choices_and_indices_draw_apart() -> None:
    logits = torch.zeros(40, 1000)
    by_choice = drawn(logits, [row([1], [], seed=3, choice=choice) for choice in range(40)])
    by_index = drawn(logits, [row([1], [0] * index, seed=3) for index in range(40)])
    assert len({token.token_id for token in by_choice}) > 30
    assert len({token.token_id for token in by_index}) > 30


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(8)
    expected = logits[0].log_softmax(-1)
    one = row(
        [1, 2],
        [3, 3],
        temperature=0.2,
        repetition_penalty=1.9,
        num_top_logprobs=4,
        top_k=3,
        logit_bias={7: 90.0},
    )
    token = drawn(logits, [one])[0]
    assert token.token_id == 7
    assert token.logprob == pytest.approx(float(expected[7]))
    assert [token_id for token_id, _ in token.top_logprobs] == expected.topk(4).indices.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(
        expected.topk(4).values.tolist()
    )


def test_logprobs_do_not_depend_on_the_batch() -> None:
    logits = random_logits(8, 4)
    rows = [row([1], [], num_top_logprobs=num_top) for num_top in (3, None, 0, 60)]
    together = drawn(logits, rows)
    assert together == [
        drawn(logits[index : index + 1], [one])[0] for index, one in enumerate(rows)
    ]
    assert [len(token.top_logprobs) for token in together] == [3, 0, 0, VOCAB_SIZE]


def test_end_tokens_come_back_after_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5] = 20.0
    one = row([1], [2], temperature=0.0, min_tokens=2, eos_token_ids=(5,))
    assert draw_one(logits, one) != 5
    one.append(2, [3])
    assert draw_one(logits, one) == 5


def test_edges_of_all_rows_at_once_equal_those_of_each() -> None:
    probabilities = (torch.randn(5, 700, generator=torch.Generator().manual_seed(1)) * 3).softmax(
        -1
    )
    wanted = [0.1, 0.5, 0.9, 0.999, 1.0]
    each = [nucleus_edge(row, share, 16) for row, share in zip(probabilities, wanted, strict=True)]
    assert torch.equal(nucleus_edges(probabilities, wanted)[:, 0], torch.stack(each))


EXTREMES = [
    0.0,
    1e-45,
    -1e-45,
    1e-38,
    88.0,
    65_504.0,
    -65_504.0,
    3.38e38,
    -3.38e38,
    math.inf,
    -math.inf,
]
extreme_rows = st.builds(
    lambda prompt, output, params: row([*prompt, 0], output, **params),
    history,
    history,
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
    ),
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
    logits = torch.tensor([[pick.choice(values) for _ in range(VOCAB_SIZE)] for _ in rows]).to(
        dtype
    )
    result = draw_tokens(logits, rows)
    for token in result.collect():
        assert token is not None
        assert 0 <= token.token_id < VOCAB_SIZE
        told = [value for _, value in token.top_logprobs] + (
            [] if token.logprob is None else [token.logprob]
        )
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
    found = {draw_one(logits, row([1], [], temperature=1e-9, seed=seed)) for seed in range(50)}
    assert found == {
        draw_one(logits, row([1], [], temperature=0.01, seed=seed)) for seed in range(50)
    }
    assert len(found) > 1
    assert draw_one(logits, row([1], [], temperature=0.0)) == 3


def test_bias_for_every_token_of_many_rows() -> None:
    bias = {token_id: float(token_id % 7) for token_id in range(VOCAB_SIZE)}
    rows = [
        row([1], [], temperature=0.0, logit_bias=bias),
        row([1], [], temperature=0.0),
        row([1], [], temperature=0.0, logit_bias=bias),
    ]
    logits = random_logits(9, 3)
    expected = logits + torch.tensor([1.0, 0.0, 1.0])[:, None] * torch.tensor(
        [bias[token_id] for token_id in range(VOCAB_SIZE)]
    )
    assert [token.token_id for token in drawn(logits, rows)] == expected.argmax(-1).tolist()
