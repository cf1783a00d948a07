"""Draw output tokens from logits.

Output token i of a choice is a pure function of its logits and (seed, choice, i): one uniform number comes from a hash of these
three, and picks the token by the inverse of the cumulative distribution in the order of the vocabulary. No generator keeps a
state, so that any engine, after any preemption or migration, draws the same.

Order of the steps as in vLLM: log-probabilities are taken from the raw logits; then logit_bias, min_tokens, penalties, and for
sampled rows temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch

from pdlaunch.engine.device_copies import Download, upload
from pdlaunch.models.packed import IntArray
from pdlaunch.protocol.engine import SamplingParams, TokenOutput

GREEDY_BELOW = 1e-5
"""Temperatures under this are taken as 0. Source: vLLM."""
NUCLEUS_GUESS_TOKENS = 256
"""Tokens that are looked at first for top_p (then 16 times as many, and so on): sorting the vocabulary costs 25 times as much."""
CPU_SLICE_LOGITS = 256 * 1024

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the next token of one row depends on, beside its logits."""

    sampling: SamplingParams
    token_ids: IntArray
    """Prompt and output so far."""
    num_prompt_tokens: int

    @property
    def output(self) -> IntArray:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def takes_the_likeliest(self) -> bool:
        """Of the logits as they are, and tells no log-probabilities."""
        return self.is_greedy and self.sampling.num_top_logprobs is None and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        sampling = self.sampling
        return (
            bool(sampling.logit_bias)
            or len(self.output) < sampling.min_tokens
            or sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )


def uniform(seed: int, choice: int, index: int) -> float:
    """The number in [0, 1) that decides output token ``index``: the upper 53 bits of BLAKE2b-64 of three little-endian u64."""
    message = struct.pack("<QQQ", seed & _SEED_MASK, choice, index)
    return (int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class DrawnTokens:
    """One token a row, on the device, and on their way to the host with the log-probabilities that rows tell."""

    def __init__(self, token_ids: torch.Tensor, rows: list[SampleRow], raw: torch.Tensor | None = None) -> None:
        """``raw``: [num_rows, vocab_size] float32; None when no row tells log-probabilities."""
        self.token_ids = token_ids
        """[num_rows]"""
        num_tops = [row.sampling.num_top_logprobs for row in rows]
        self._num_tops = {index: num_top for index, num_top in enumerate(num_tops) if num_top is not None}
        told = [] if raw is None or not self._num_tops else _logprobs(raw, token_ids, self._num_tops)
        self._copy = Download([token_ids, *told], token_ids.device)

    def collect(self) -> list[TokenOutput]:
        """In the order of the rows; waits until they are here."""
        token_ids, *told = (tensor.tolist() for tensor in self._copy.wait())
        outputs = [TokenOutput(token_id=token_id) for token_id in token_ids]
        for (index, num_top), logprob, values, best in zip(self._num_tops.items(), *(told or [[]] * 3), strict=True):
            pairs = tuple(zip(best[:num_top], values[:num_top], strict=True))
            outputs[index] = TokenOutput(token_id=token_ids[index], logprob=logprob, top_logprobs=pairs)
        return outputs


def draw_tokens(logits: torch.Tensor, rows: list[SampleRow], likeliest: torch.Tensor | None = None) -> DrawnTokens:
    """``logits``: [num_rows, vocab_size], left as they are. One token a row, in their order.

    ``likeliest``: [num_rows], the logits' argmax, when it is known. On a GPU the host waits for nothing, unless a row has
    penalties.
    """
    if all(row.takes_the_likeliest for row in rows):
        return DrawnTokens(logits.argmax(dim=-1) if likeliest is None else likeliest, rows)
    raw = logits.float()
    changed = _change_logits(raw, rows)
    token_ids = changed.argmax(dim=-1)
    sampled = [index for index, row in enumerate(rows) if not row.is_greedy]
    if sampled:
        token_ids[_indices(sampled, logits)] = _sample_in_slices(changed, sampled, rows)
    return DrawnTokens(token_ids, rows, raw)


def _logprobs(raw: torch.Tensor, token_ids: torch.Tensor, num_tops: dict[int, int]) -> list[torch.Tensor]:
    """Of the rows in ``num_tops``: [n] of the token, [n, k] of the likeliest and [n, k] their ids, k the largest wanted."""
    rows = _indices([*num_tops], raw)
    logprobs = raw[rows].log_softmax(dim=-1)
    top = logprobs.topk(min(max(1, *num_tops.values()), raw.shape[-1]))
    return [logprobs.gather(1, token_ids[rows, None])[:, 0], top.values, top.indices]


def _change_logits(raw: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Biases, forbidden end tokens and penalties; the result shares memory with ``raw`` when no row has any."""
    if not any(row.changes_logits for row in rows):
        return raw
    changed = raw.clone()
    for logits, row in zip(changed, rows, strict=True):
        if row.changes_logits:
            _change_row(logits, row)
    return changed


def _change_row(logits: torch.Tensor, row: SampleRow) -> None:
    """In place, ``logits``: [vocab_size]."""
    sampling = row.sampling
    for token_id, bias in sampling.logit_bias.items():
        if token_id < len(logits):
            logits[token_id] += bias
    if len(row.output) < sampling.min_tokens:
        forbidden = {*sampling.eos_token_ids, *sampling.stop_token_ids}
        logits.index_fill_(0, _indices([token_id for token_id in forbidden if token_id < len(logits)], logits), float("-inf"))
    if sampling.repetition_penalty != 1.0:
        seen = _to_index(np.unique(row.token_ids), logits)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        token_ids, counts = np.unique(row.output, return_counts=True)
        penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits[_to_index(token_ids, logits)] -= torch.from_numpy(penalty).to(logits)


def _to_index(token_ids: IntArray, logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(token_ids).to(logits.device)


def _sample_in_slices(logits: torch.Tensor, sampled: list[int], rows: list[SampleRow]) -> torch.Tensor:
    """Token ids of the rows ``sampled``. On a CPU a few rows at once: temporaries that fit the cache are four times as fast."""
    at_once = max(1, CPU_SLICE_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(sampled)
    slices = [sampled[start : start + at_once] for start in range(0, len(sampled), at_once)]
    return torch.cat([_sample(logits[_indices(part, logits)], [rows[index] for index in part]) for part in slices])


def _sample(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """``logits``: [num_rows, vocab_size]; returns token ids [num_rows]."""
    scaled = logits / _column([row.sampling.temperature for row in rows], logits)
    scaled = _keep_min_p(scaled, rows)
    scaled = _keep_top_k(scaled, rows)
    scaled = _keep_top_p(scaled, rows)
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    draws = [uniform(row.sampling.seed, row.sampling.choice, len(row.output)) for row in rows]
    total = cumulated[:, -1:]
    # The product may round up to the total, which no token's interval holds.
    target = (_column(draws, cumulated) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


def _keep_min_p(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Drop tokens less likely than min_p times the likeliest."""
    if not any(row.sampling.min_p > 0 for row in rows):
        return logits
    least = logits.amax(dim=-1, keepdim=True) + _column([row.sampling.min_p for row in rows], logits).log()
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_k(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Drop tokens less likely than the k-th; all that tie with it stay, so that no sort decides."""
    vocab_size = logits.shape[-1]
    kept = [min(row.sampling.top_k, vocab_size) if row.sampling.top_k > 0 else vocab_size for row in rows]
    limited = [index for index, k in enumerate(kept) if k < vocab_size]
    if not limited:
        return logits
    indices = _indices(limited, logits)
    best = logits[indices].topk(max(kept[index] for index in limited)).values
    least = torch.full_like(logits[:, :1], float("-inf"))
    least[indices] = best.gather(1, _indices([kept[index] - 1 for index in limited], logits)[:, None])
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_p(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Keep the likeliest tokens that together have probability top_p; all that tie with the last of them stay."""
    limited = [index for index, row in enumerate(rows) if row.sampling.top_p < 1.0]
    if not limited:
        return logits
    probabilities = logits.softmax(dim=-1)
    least = torch.zeros_like(probabilities[:, :1])
    if logits.device.type == "cpu":
        for index in limited:
            least[index] = _nucleus_edge(probabilities[index], rows[index].sampling.top_p, NUCLEUS_GUESS_TOKENS)
    else:
        indices = _indices(limited, logits)
        least[indices] = nucleus_edges(probabilities[indices], [rows[index].sampling.top_p for index in limited])
    return logits.masked_fill(probabilities < least, float("-inf"))


def nucleus_edges(probabilities: torch.Tensor, wanted: list[float]) -> torch.Tensor:
    """[num_rows, 1] of [num_rows, vocab_size]; sorts everything, but the host waits for nothing."""
    best = probabilities.sort(dim=-1, descending=True).values
    cumulated = best.cumsum(dim=-1, dtype=torch.float64)
    last = (cumulated < _column(wanted, cumulated)).sum(dim=-1, keepdim=True)
    return best.gather(1, last.clamp(max=best.shape[-1] - 1))


def _nucleus_edge(probabilities: torch.Tensor, wanted: float, num_tokens: int) -> torch.Tensor:
    """``probabilities``: [vocab_size]; the smallest one in the nucleus."""
    best = probabilities.topk(min(num_tokens, len(probabilities))).values
    cumulated = best.cumsum(dim=-1, dtype=torch.float64)
    if num_tokens < len(probabilities) and float(cumulated[-1]) < wanted:
        return _nucleus_edge(probabilities, wanted, num_tokens * 16)
    last = int((cumulated < wanted).sum())
    return best[min(last, len(best) - 1)]


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return upload(values, like.dtype, like.device)[:, None]


def _indices(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return upload(values, torch.int64, like.device)
