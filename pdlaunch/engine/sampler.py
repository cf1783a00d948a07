"""Draws output tokens from logits.

Output token i of a choice is a pure function of its logits and (seed, choice, i), so that any
engine draws the same token, also after a preemption or migration. The token with the largest
quotient of weight and noise is drawn. Other batch shapes round logits differently: this changes the
draw only if two quotients are as close as rounding errors. Inverting the cumulative distribution
instead would move the borders of all tokens.

The order of the steps is vLLM's. The caller has applied grammar masks to the logits. From these,
log-probabilities are computed. Then follow logit_bias, min_tokens and penalties, and for sampled
rows temperature, min_p, top_k and top_p. No parameter turns a logit that is a number into NaN.
Logits may be infinite. A row with a NaN draws no token.
"""

import hashlib
import struct

import numpy as np
import torch

from pdlaunch.engine.models.step_inputs import Download, upload, upload_array
from pdlaunch.engine.rows import Row
from pdlaunch.protocol.kv_params import TokenOutput

LEAST_TEMPERATURE = 0.01  # temperatures between 0 and this one are raised to it. Source: vLLM.
# Limit of temperatures, so that forbidden tokens, at the lowest float32, keep a weight of 0.
MOST_TEMPERATURE = 1e30
# Number of tokens that top_p sorts first (then 16 times as many, and so on). Sorting the whole
# vocabulary costs 25 times as much.
NUCLEUS_GUESS_TOKENS = 256
# Number of logits that a CPU samples at once: temporaries in its cache are four times as fast
CPU_SLICE_LOGITS = 256 * 1024
# Tokens of a group. A draw chooses a group of neighbours first, then a token in it. Noise for each
# token of the vocabulary would cost 13 times as much. A change of this number changes draws, and
# engines of different versions must draw the same.
GROUP_TOKENS = 256
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; the value that OpenAI uses
NO_TOKEN = -1  # stands for the token of a row with a NaN
_FLOAT32 = torch.finfo(torch.float32)


class DrawnTokens:
    """Copies one token for each row to the host, with log-probabilities if they are requested."""

    def __init__(
        self, drawn: torch.Tensor, num_tops: list[int | None], logits: torch.Tensor
    ) -> None:
        """``logits``: [num_rows, vocab_size], before biases and penalties. ``num_tops``:
        ``num_top_logprobs`` or ``num_prompt_logprobs`` of each row.
        """
        self._vocab_size = logits.shape[-1]
        # [num_rows], input of the next step, which may be launched before the host sees NO_TOKEN:
        # so all ids are in the vocabulary, and the host drops the results of rows without a token.
        self.token_ids = drawn.clamp(0, self._vocab_size - 1)
        self._num_tops = {index: num for index, num in enumerate(num_tops) if num is not None}
        told = _logprobs(logits, self.token_ids, self._num_tops) if self._num_tops else []
        self._copy = Download([drawn, *told], drawn.device)

    def collect(self) -> list[TokenOutput | None]:
        """Return the tokens in the order of the rows; None where none could be drawn."""
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
    logits: torch.Tensor, rows: list[Row], likeliest: torch.Tensor | None = None
) -> DrawnTokens:
    """Draw one token for each row. Does not change ``logits``, [num_rows, vocab_size].
    ``likeliest``: their ``likeliest_tokens``, if known. On a GPU the host does not wait, unless a
    row has penalties.
    """
    num_tops = [row.sampling.num_top_logprobs for row in rows]
    if all(row.is_greedy and not row.changes_logits for row in rows):
        # Greedy rows need no float32 copy of the logits, and no noise.
        likeliest = likeliest_tokens(logits) if likeliest is None else likeliest
        return DrawnTokens(likeliest, num_tops, logits)
    changed = _change_logits(logits.float(), rows)
    token_ids = likeliest_tokens(changed)
    sampled = [index for index, row in enumerate(rows) if not row.is_greedy]
    num_at_once = len(sampled)
    if logits.device.type == "cpu":
        num_at_once = max(1, CPU_SLICE_LOGITS // logits.shape[-1])
    for start in range(0, len(sampled), num_at_once or 1):
        part = sampled[start : start + num_at_once]
        places = _indices(part, logits)
        found = _sample(changed[places], [rows[index] for index in part])
        # A row with a NaN stays without a token, because its sampled token is meaningless.
        token_ids[places] = torch.where(token_ids[places] == NO_TOKEN, NO_TOKEN, found)
    return DrawnTokens(token_ids, num_tops, logits)


def likeliest_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the argmax, [num_rows], of [num_rows, vocab_size]; NO_TOKEN for rows with a NaN."""
    # In two stages: in a single one, a GPU uses one multiprocessor for each row, for 37 us.
    num_rows, vocab_size = logits.shape
    num_parts = next(parts for parts in (64, 32, 16, 8, 4, 2, 1) if vocab_size % parts == 0)
    values, places = logits.reshape(num_rows, num_parts, -1).max(dim=-1)
    best, part = values.max(dim=-1, keepdim=True)
    found = places.gather(1, part) + part * (vocab_size // num_parts)
    return torch.where(best.isnan(), NO_TOKEN, found)[:, 0]


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_tops: dict[int, int]
) -> list[torch.Tensor]:
    """Return log-probabilities of the rows in ``num_tops``: [n] of the row's token, [n, k] of the
    likeliest tokens, and [n, k] the ids of the latter; k is the largest of ``num_tops``.
    """
    rows = _indices([*num_tops], logits)
    logprobs = logits[rows].float().nan_to_num().log_softmax(dim=-1).clamp_(min=LOWEST_LOGPROB)
    top = logprobs.topk(min(max(1, *num_tops.values()), logits.shape[-1]))
    return [logprobs.gather(1, token_ids[rows, None])[:, 0], top.values, top.indices]


# Biases and penalties


def _change_logits(raw: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Return ``raw``, [num_rows, vocab_size] float32, with the rows' biases and penalties."""
    if not any(row.changes_logits for row in rows):
        return raw
    changed, vocab_size = raw.clone(memory_format=torch.contiguous_format), raw.shape[-1]
    biases = [(index * vocab_size, *row.bias) for index, row in enumerate(rows) if row.bias]
    if biases:
        # One operation for all entries: 49,000 of them take 0.8 ms, one by one they took 352 ms.
        places = np.concatenate([ids[ids < vocab_size] + start for start, ids, _ in biases])
        values = np.concatenate([values[ids < vocab_size] for _, ids, values in biases])
        changed.view(-1).index_add_(
            0, upload_array(places, raw.device), upload_array(values, raw.device)
        )
    for logits, row in zip(changed, rows, strict=True):
        if row.changes_with_tokens:
            _change_row(logits, row)
    return changed


def _change_row(logits: torch.Tensor, row: Row) -> None:
    """Change one row's ``logits``, [vocab_size], in place."""
    sampling = row.sampling
    if len(row.output) < sampling.min_tokens:
        forbidden = {*sampling.eos_token_ids, *sampling.stop_token_ids}
        indices = _indices([token_id for token_id in forbidden if token_id < len(logits)], logits)
        logits.index_fill_(0, indices, float("-inf"))
    if sampling.repetition_penalty != 1.0:
        # Finite and above 0: infinity times 0 is NaN, and so is 0 times minus infinity.
        penalty = min(max(sampling.repetition_penalty, _FLOAT32.tiny), _FLOAT32.max)
        seen = upload_array(np.unique(row.known), logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        token_ids, counts = np.unique(row.output, return_counts=True)
        penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits[upload_array(token_ids, logits.device)] -= upload_array(
            penalties.astype(np.float32), logits.device
        )


# Sampling


def _sample(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    # Make the largest log-weight 0, so that a low temperature cannot turn it into infinity.
    scaled = logits.nan_to_num_().sub_(logits.amax(dim=-1, keepdim=True))
    temperatures = [
        min(max(row.sampling.temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE) for row in rows
    ]
    scaled.div_(_column(temperatures, scaled))
    scaled = _keep_top_p(_keep_top_k(_keep_min_p(scaled, rows), rows), rows)
    keys = [draw_key(row.sampling.seed, row.sampling.choice, len(row.output)) for row in rows]
    return draw_by_noise(scaled, _indices(keys, logits))


def _keep_min_p(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    if not any(row.sampling.min_p > 0 for row in rows):
        return logits
    shares = _column([row.sampling.min_p for row in rows], logits)
    least = logits.amax(dim=-1, keepdim=True) + shares.log()
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_k(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Drop tokens less likely than the k-th. Ties with it stay: the sort order does not matter."""
    limited = {
        index: row.sampling.top_k
        for index, row in enumerate(rows)
        if 0 < row.sampling.top_k < logits.shape[-1]
    }
    if not limited:
        return logits
    indices = _indices([*limited], logits)
    best = logits[indices].topk(max(limited.values())).values
    least = torch.full_like(logits[:, :1], float("-inf"))
    least[indices] = best.gather(1, _indices([k - 1 for k in limited.values()], logits)[:, None])
    return logits.masked_fill(logits < least, float("-inf"))


def _keep_top_p(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """Keep the likeliest tokens whose sum of probabilities is top_p, and ties with the last."""
    limited = {
        index: row.sampling.top_p for index, row in enumerate(rows) if row.sampling.top_p < 1.0
    }
    if not limited:
        return logits
    probabilities = logits.softmax(dim=-1)
    least = torch.zeros_like(probabilities[:, :1])
    indices = _indices([*limited], logits)
    least[indices] = nucleus_edges(probabilities[indices], [*limited.values()])
    return logits.masked_fill(probabilities < least, float("-inf"))


def nucleus_edges(
    probabilities: torch.Tensor, wanted: list[float], num_tokens: int = NUCLEUS_GUESS_TOKENS
) -> torch.Tensor:
    """Return [num_rows, 1], the smallest probability in each nucleus. A CPU sorts the
    ``num_tokens`` likeliest first, and more only if a row needs them. A GPU sorts all: the host
    would have to wait.
    """
    is_whole = probabilities.device.type != "cpu" or num_tokens >= probabilities.shape[-1]
    if is_whole:
        best = probabilities.sort(dim=-1, descending=True).values
    else:
        best = probabilities.topk(num_tokens).values
    cumulated = best.cumsum(dim=-1, dtype=torch.float64)
    shares = _column(wanted, cumulated)
    if not is_whole and bool((cumulated[:, -1:] < shares).any()):
        return nucleus_edges(probabilities, wanted, num_tokens * 16)
    last = (cumulated < shares).sum(dim=-1, keepdim=True)
    return best.gather(1, last.clamp(max=best.shape[-1] - 1))


def draw_by_noise(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return token ids [num_rows], each drawn in proportion to its weight. ``scaled``: [num_rows,
    vocab_size] log-weights, the largest 0. First a group of neighbours is drawn by the sum of its
    weights, then a token in it. Each group has its own noise, with a number below 0. All groups
    share the noise of their places, with numbers from 0 on, because a row uses the places of one
    group only.
    """
    num_rows, vocab_size = scaled.shape
    padded = torch.nn.functional.pad(scaled, (0, -vocab_size % GROUP_TOKENS), value=float("-inf"))
    groups = padded.view(num_rows, -1, GROUP_TOKENS)
    num_groups = groups.shape[1]
    # number    -num_groups .. -1      0 .. GROUP_TOKENS - 1
    # noise of  groups                 places in the group that was drawn
    # Exponential noise: the argmax of weights / noise is each index in proportion to its weight.
    numbers = torch.arange(-num_groups, GROUP_TOKENS, device=scaled.device)
    noise = -uniform_noise(keys, numbers).log()
    group = (groups.exp().sum(dim=-1).double() / noise[:, :num_groups]).argmax(dim=-1, keepdim=True)
    neighbours = groups.gather(1, group[:, :, None].expand(-1, -1, GROUP_TOKENS))[:, 0].double()
    place = (neighbours.exp() / noise[:, num_groups:]).argmax(dim=-1, keepdim=True)
    return (group * GROUP_TOKENS + place)[:, 0]


# Noise is a pure function of (seed, choice, index, number); no generator keeps a state. The host
# hashes (seed, choice, index) to one key for each row. The device hashes key and number to a
# uniform number (SplitMix64).
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR = 0x94D049BB133111EB - 2**64
# One bit fewer than a double holds: then the middle of each interval is neither 0 nor 1, whose
# logarithms, minus infinity and 0, cannot be used as noise
_UNIFORM_BITS = 52


def draw_key(seed: int, choice: int, index: int) -> int:
    """Return the key of output token ``index`` of a choice: BLAKE2b-64 of little-endian u64s."""
    message = struct.pack("<QQQ", seed & (2**64 - 1), choice, index)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little", signed=True)


def uniform_noise(keys: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return float64 in (0, 1) of keys [num_rows] and numbers [n] or [num_rows, n], all int64."""
    mixed = keys[:, None] + numbers * _INCREMENT
    mixed = (mixed ^ _shift_right(mixed, 30)) * _FIRST_FACTOR
    mixed = (mixed ^ _shift_right(mixed, 27)) * _SECOND_FACTOR
    mixed = mixed ^ _shift_right(mixed, 31)
    # The sum moves [-0.5, 0.5) to (0, 1), to the middles of intervals. Both steps are exact.
    middle = 0.5 + 2.0 ** -(_UNIFORM_BITS + 1)
    return (mixed >> (64 - _UNIFORM_BITS)).double() * 2.0**-_UNIFORM_BITS + middle


def _shift_right(numbers: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Shift as if the numbers were unsigned, for which torch has no operation."""
    return (numbers >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return upload(values, like.dtype, like.device)[:, None]


def _indices(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return upload(values, torch.int64, like.device)
