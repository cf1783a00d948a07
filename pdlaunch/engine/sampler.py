"""Draw output tokens from logits.

Output token i of a choice is a pure function of its logits and (seed, choice, i), so that any
engine, after any preemption or migration, draws the same. The token whose weight divided by noise
(``noise.py``) is largest is drawn: logits that another batch shape rounds differently move the draw
only where two tokens are as near to each other as their rounding errors, while a sum over the
vocabulary (the inverse of the cumulative distribution) moves the borders of all tokens.

Order of the steps as in vLLM: log-probabilities are taken from the raw logits; then
``logit_changes.py``, and for sampled rows temperature, min_p, top_k, top_p. Logits may be infinite.
A row with a NaN draws no token.
"""

from __future__ import annotations

import torch

from pdlaunch.engine.device_copies import Download, upload
from pdlaunch.engine.logit_changes import SampleRow, change_logits
from pdlaunch.engine.noise import draw_key, exponential_noise
from pdlaunch.protocol.engine import TokenOutput

NUCLEUS_GUESS_TOKENS = 256
"""Number of tokens that top_p sorts first (then 16 times as many, and so on). Sorting the whole
vocabulary costs 25 times as much.
"""
CPU_SLICE_LOGITS = 256 * 1024
GROUP_TOKENS = 256
"""Tokens of a group. A draw chooses a group of neighbours first, then a token in it: noise for each
token of the vocabulary costs 13 times as much.

Engines of different versions must draw the same: a change breaks running deployments.
"""
LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; the value that OpenAI uses."""
NO_TOKEN = -1
"""Stands for the token of a row with a NaN."""


class DrawnTokens:
    """Holds one token a row, and the log-probabilities that rows ask for.

    They are on the device, and on their way to the host.
    """

    def __init__(
        self,
        drawn: torch.Tensor,
        rows: list[SampleRow],
        logits: torch.Tensor,
        *,
        tells: bool = False,
    ) -> None:
        """Begin the copy to the host.

        ``drawn``: [num_rows]; ``logits``: [num_rows, vocab_size], as they were. ``tells``: rows may
        want log-probabilities.
        """
        self._vocab_size = logits.shape[-1]
        # The next step may be queued behind this one already, and must look nothing up outside of
        # its table; the host drops what it computes for such a row.
        self.token_ids = drawn.clamp(0, self._vocab_size - 1)
        """[num_rows] input of the next step on the device; NO_TOKEN is replaced by an id of the
        vocabulary, as the next step looks it up
        """
        num_tops = [row.sampling.num_top_logprobs for row in rows]
        self._num_tops = {
            index: num_top for index, num_top in enumerate(num_tops) if num_top is not None
        }
        told = _logprobs(logits, self.token_ids, self._num_tops) if tells and self._num_tops else []
        self._copy = Download([drawn, *told], drawn.device)

    def collect(self) -> list[TokenOutput | None]:
        """Wait for the tokens and return them in the order of the rows.

        None stands for a row of which no token could be drawn.
        """
        token_ids, *told = (tensor.tolist() for tensor in self._copy.wait())
        outputs = [TokenOutput(token_id=token_id) for token_id in token_ids]
        for (index, num_top), logprob, values, best in zip(
            self._num_tops.items(), *(told or [[]] * 3), strict=True
        ):
            pairs = tuple(zip(best[:num_top], values[:num_top], strict=True))
            outputs[index] = TokenOutput(
                token_id=token_ids[index], logprob=logprob, top_logprobs=pairs
            )
        return [token if 0 <= token.token_id < self._vocab_size else None for token in outputs]


def draw_tokens(
    logits: torch.Tensor, rows: list[SampleRow], likeliest: torch.Tensor | None = None
) -> DrawnTokens:
    """Draw one token a row, in their order, and leave ``logits``, [num_rows, vocab_size], as they
    are.

    ``likeliest``: [num_rows], ``likeliest_tokens`` of the logits, when they are known. On a GPU the
    host waits for nothing, unless a row has penalties.
    """
    if all(row.takes_the_likeliest for row in rows):
        # Greedy rows need no float32 copy of the logits, and no noise.
        return DrawnTokens(
            likeliest_tokens(logits) if likeliest is None else likeliest, rows, logits
        )
    changed = change_logits(logits.float(), rows)
    token_ids = likeliest_tokens(changed)
    sampled = [index for index, row in enumerate(rows) if not row.is_greedy]
    if sampled:
        places = _indices(sampled, logits)
        found = _sample_in_slices(changed, sampled, rows)
        # A row with a NaN stays without a token: its sampled one means nothing.
        token_ids[places] = torch.where(token_ids[places] == NO_TOKEN, NO_TOKEN, found)
    return DrawnTokens(token_ids, rows, logits, tells=True)


def likeliest_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return [num_rows] of [num_rows, vocab_size]; NO_TOKEN where one of the logits is NaN."""
    # On a GPU in two stages: one would keep a multiprocessor a row busy for 37 us.
    num_rows, vocab_size = logits.shape
    num_parts = next(parts for parts in (64, 32, 16, 8, 4, 2, 1) if vocab_size % parts == 0)
    values, places = logits.reshape(num_rows, num_parts, -1).max(dim=-1)
    best, part = values.max(dim=-1, keepdim=True)
    found = places.gather(1, part) + part * (vocab_size // num_parts)
    return torch.where(best.isnan(), NO_TOKEN, found)[:, 0]


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_tops: dict[int, int]
) -> list[torch.Tensor]:
    """Return log-probabilities of the rows in ``num_tops``.

    They are [n] of the token, [n, k] of the likeliest, and [n, k] the ids of these; k is the
    largest number wanted.
    """
    rows = _indices([*num_tops], logits)
    logprobs = logits[rows].float().nan_to_num().log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    top = logprobs.topk(min(max(1, *num_tops.values()), logits.shape[-1]))
    return [logprobs.gather(1, token_ids[rows, None])[:, 0], top.values, top.indices]


def _sample_in_slices(
    logits: torch.Tensor, sampled: list[int], rows: list[SampleRow]
) -> torch.Tensor:
    """Return the token ids of the rows ``sampled``.

    On a CPU a few rows are computed at once: temporaries that fit the cache are four times as fast.
    """
    at_once = (
        max(1, CPU_SLICE_LOGITS // logits.shape[-1])
        if logits.device.type == "cpu"
        else len(sampled)
    )
    slices = [sampled[start : start + at_once] for start in range(0, len(sampled), at_once)]
    return torch.cat(
        [
            _sample(logits[_indices(part, logits)], [rows[index] for index in part])
            for part in slices
        ]
    )


def _sample(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Return token ids [num_rows]; ``logits``, [num_rows, vocab_size], are overwritten."""
    # The likeliest becomes 0: whatever the temperature makes of the others is at most that.
    scaled = logits.nan_to_num_().sub_(logits.amax(dim=-1, keepdim=True))
    scaled.div_(_column([row.temperature for row in rows], scaled))
    scaled = _keep_min_p(scaled, rows)
    scaled = _keep_top_k(scaled, rows)
    scaled = _keep_top_p(scaled, rows)
    keys = [draw_key(row.sampling.seed, row.sampling.choice, len(row.output)) for row in rows]
    return draw_by_noise(scaled, _indices(keys, logits))


def draw_by_noise(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return token ids [num_rows], each drawn as its weight says.

    ``scaled``: [num_rows, vocab_size] float32, log-weights, the largest 0; ``keys``: [num_rows].
    First a group of neighbours is drawn by the sum of its weights, then one of them. Noise has
    numbers below 0 for the groups. Those from 0 on serve for the places in whichever group was
    drawn, as only one is looked into.
    """
    num_rows, vocab_size = scaled.shape
    padded = torch.nn.functional.pad(scaled, (0, -vocab_size % GROUP_TOKENS), value=float("-inf"))
    groups = padded.view(num_rows, -1, GROUP_TOKENS)
    num_groups = groups.shape[1]
    # number    -num_groups .. -1      0 .. GROUP_TOKENS - 1
    # noise of  groups                 places in the group that was drawn
    noise = exponential_noise(keys, torch.arange(-num_groups, GROUP_TOKENS, device=scaled.device))
    group = (groups.exp().sum(dim=-1).double() / noise[:, :num_groups]).argmax(dim=-1, keepdim=True)
    neighbours = groups.gather(1, group[:, :, None].expand(-1, -1, GROUP_TOKENS))[:, 0].double()
    place = (neighbours.exp() / noise[:, num_groups:]).argmax(dim=-1, keepdim=True)
    return (group * GROUP_TOKENS + place)[:, 0]


def _keep_min_p(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Drop tokens less likely than min_p times the likeliest."""
    if not any(row.sampling.min_p > 0 for row in rows):
        return logits
    least = (
        logits.amax(dim=-1, keepdim=True)
        + _column([row.sampling.min_p for row in rows], logits).log()
    )
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_k(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Drop tokens less likely than the k-th; all that tie with it stay, so that no sort decides."""
    vocab_size = logits.shape[-1]
    kept = [
        min(row.sampling.top_k, vocab_size) if row.sampling.top_k > 0 else vocab_size
        for row in rows
    ]
    limited = [index for index, k in enumerate(kept) if k < vocab_size]
    if not limited:
        return logits
    indices = _indices(limited, logits)
    best = logits[indices].topk(max(kept[index] for index in limited)).values
    least = torch.full_like(logits[:, :1], float("-inf"))
    least[indices] = best.gather(
        1, _indices([kept[index] - 1 for index in limited], logits)[:, None]
    )
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_p(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Keep the likeliest tokens that together have probability top_p; all that tie with the last of
    them stay.
    """
    limited = [index for index, row in enumerate(rows) if row.sampling.top_p < 1.0]
    if not limited:
        return logits
    probabilities = logits.softmax(dim=-1)
    least = torch.zeros_like(probabilities[:, :1])
    if logits.device.type == "cpu":
        for index in limited:
            least[index] = _nucleus_edge(
                probabilities[index], rows[index].sampling.top_p, NUCLEUS_GUESS_TOKENS
            )
    else:
        indices = _indices(limited, logits)
        least[indices] = nucleus_edges(
            probabilities[indices], [rows[index].sampling.top_p for index in limited]
        )
    return logits.masked_fill(probabilities < least, float("-inf"))


def nucleus_edges(probabilities: torch.Tensor, wanted: list[float]) -> torch.Tensor:
    """Return [num_rows, 1], the smallest probability in each nucleus, of [num_rows, vocab_size].

    It sorts everything, but the host waits for nothing.
    """
    best = probabilities.sort(dim=-1, descending=True).values
    cumulated = best.cumsum(dim=-1, dtype=torch.float64)
    last = (cumulated < _column(wanted, cumulated)).sum(dim=-1, keepdim=True)
    return best.gather(1, last.clamp(max=best.shape[-1] - 1))


def _nucleus_edge(probabilities: torch.Tensor, wanted: float, num_tokens: int) -> torch.Tensor:
    """Return the smallest probability in the nucleus of ``probabilities``, [vocab_size]."""
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
