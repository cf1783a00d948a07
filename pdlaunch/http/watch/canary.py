"""Proves a pair of engines by a canary: a short prompt, computed by one, decoded by the other.

::

    prompt ──> prefill, max_tokens=1, do_remote_decode ──> kv_transfer_params
                                                              └──> decode ──> 4 tokens   equal?
    prompt ──> prefill, alone ───────────────────────────────────> 4 tokens ──────┘
    decode's count of bytes read: before < after
    decode's usage: all but the prompt's last tokens were cached, where it tells

An engine that is healthy may still compute every prompt itself, or read another's bytes. Its count
of bytes is of all requests: under traffic the usage alone tells what became of this one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdlaunch.errors import PdlaunchError, ProtocolError
from pdlaunch.http.watch.engine_api import Counts, EngineApi, Kind
from pdlaunch.http.watch.usage import CACHED_AT_PREFILL, num_recomputed

NUM_BLOCKS = 2
NUM_TOKENS = 4
DEFAULT_BLOCK_SIZE = 128
TIMEOUT_S = 60.0
TOLERANCE = 0.25
"""Largest difference of a token's logprob between two ways to compute it in 16 bits."""
BYTES_READ: dict[Kind, str] = {
    "vllm": "vllm:nixl_bytes_transferred_sum",
    "native": "pdlaunch_kv_transfer_bytes_total",
}
SECONDS_READ: dict[Kind, str] = {
    "vllm": "vllm:nixl_xfer_time_seconds_sum",
    "native": "pdlaunch_kv_transfer_seconds_total",
}
"""Names of what decode engines count, by their kind."""
FIRST_TOKEN_ID = 100
"""Ids below are often special tokens."""
NUM_TOKEN_IDS = 150
"""Ids that prompts are drawn from; a vocabulary of bytes has them too."""

REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class CanaryDied(PdlaunchError):
    """Tells why a pair must not be used.

    ``fatal``: the engines are healthy and their answers differ, so that trying again is no help.
    ``params``: as in Proof.
    """

    def __init__(
        self, reason: str, *, fatal: bool = False, params: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(reason)
        self.fatal = fatal
        self.params = params or {}


@dataclass(frozen=True, slots=True)
class Proof:
    """Says what a canary has shown."""

    seconds: float
    num_bytes: int
    transfer_s: float
    """Seconds that the engine counted for the READs; 0 when it counts none."""
    is_told: bool = True
    """Decode has told that it computed none of these tokens; else its count of bytes is the proof,
    which READs of other requests add to."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that prefill hands to decode: ``remote_engine_id``, ``remote_host`` and so on."""

    @property
    def gigabytes_per_s(self) -> float | None:
        return self.num_bytes / self.transfer_s / 1e9 if self.transfer_s else None


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


async def send_canary(
    prefill: EngineApi, decode: EngineApi, model: str, *, is_exact: bool, kind: Kind = "vllm"
) -> Proof:
    """Send one canary through a pair. Raises CanaryDied, ProtocolError.

    ``is_exact``: the tokens of both ways must be equal; else their logprobs, within TOLERANCE.
    """
    started_at = time.monotonic()
    before = await decode.counts(TIMEOUT_S)
    # New each time: of a prompt that decode has cached, no byte would move.
    request = {
        "model": model,
        "prompt": _new_prompt(before),
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    handed = await prefill.complete(
        request | {"max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}, TIMEOUT_S
    )
    params = handed.get("kv_transfer_params")
    if not params:
        raise CanaryDied(
            "prefill answered without kv_transfer_params: it has no KV connector, or refused",
            fatal=True,
        )
    lent = {name: value for name, value in params.items() if name != CACHED_AT_PREFILL}
    answer = await decode.complete(request | {"kv_transfer_params": lent}, TIMEOUT_S)
    told = _tokens(answer)
    expected = _tokens(await prefill.complete(request, TIMEOUT_S))
    if reason := _difference(told, expected, is_exact=is_exact):
        raise CanaryDied(reason, fatal=True, params=params)
    if num_tokens := _num_recomputed(answer):
        raise CanaryDied(
            f"decode computed the prompt itself: {num_tokens} tokens whose KV blocks it was handed",
            params=params,
        )
    after = await decode.counts(TIMEOUT_S)
    num_bytes = int(after.total(BYTES_READ[kind]) - before.total(BYTES_READ[kind]))
    if num_bytes <= 0:
        raise CanaryDied(
            "decode read no byte of the prompt's KV blocks: it computed the prompt itself",
            params=params,
        )
    return Proof(
        time.monotonic() - started_at,
        num_bytes,
        after.total(SECONDS_READ[kind]) - before.total(SECONDS_READ[kind]),
        _num_recomputed(answer) is not None,
        params,
    )


def _new_prompt(counts: Counts) -> list[int]:
    block_size = counts.label("vllm:cache_config_info", "block_size")
    length = NUM_BLOCKS * (
        int(block_size) if block_size and block_size.isdecimal() else DEFAULT_BLOCK_SIZE
    )
    draw = random.SystemRandom()
    # One more: the last token of a prompt is computed by decode itself.
    return [FIRST_TOKEN_ID + draw.randrange(NUM_TOKEN_IDS) for _ in range(length + 1)]


def _tokens(answer: dict[str, Any]) -> _Tokens:
    """Read token ids and logprobs of an answer. Raises ProtocolError."""
    try:
        choice = answer["choices"][0]
        return _Tokens(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
    except (LookupError, TypeError) as error:
        raise ProtocolError(f"not an answer with token ids and logprobs: {error!r}") from error


def _num_recomputed(answer: dict[str, Any]) -> int | None:
    """Return what ``num_recomputed`` does. Raises ProtocolError."""
    try:
        return num_recomputed(answer)
    except (LookupError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not a usage: {error!r}") from error


def _difference(told: _Tokens, expected: _Tokens, *, is_exact: bool) -> str:
    """Return what is wrong with the tokens of a pair, empty: nothing."""
    if is_exact:
        if told.ids == expected.ids:
            return ""
        return (
            f"decode answered tokens {list(told.ids)}, prefill alone {list(expected.ids)}: decode "
            "computes with other KV blocks than it was handed"
        )
    # After a token that differs, the next ones have another context.
    for token, other, logprob, other_logprob in zip(
        told.ids, expected.ids, told.logprobs, expected.logprobs, strict=True
    ):
        if not math.isclose(logprob, other_logprob, abs_tol=TOLERANCE):
            return (
                f"logprobs {logprob:.3f} (decode) and {other_logprob:.3f} (prefill alone) differ "
                f"by more than {TOLERANCE}"
            )
        if token != other:
            break
    return ""
