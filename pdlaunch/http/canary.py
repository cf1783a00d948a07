"""Proves pairs of engines with canaries: short prompts that one engine prefills and one decodes.

::

    prompt ──> prefill, max_tokens=1, do_remote_decode ──> kv_transfer_params
                                                              └──> decode ──> 4 tokens   equal?
    prompt ──> prefill, alone ───────────────────────────────────> 4 tokens ──────┘
    decode's counter of bytes read, if it has one: before < after
    decode's usage, if it is reported: all but the prompt's last tokens were cached

A healthy decode engine may still compute every prompt itself, or read wrong bytes. Its byte counter
is for all requests, so under traffic only the usage shows whether this prompt was read.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, Generic, TypeVar

from pdlaunch.errors import PdlaunchError, ProtocolError
from pdlaunch.http.engine_calls import Counts, EngineApi

NUM_BLOCKS = 2
MOST_TOKENS = 256  # bounds the prompt: blocks of state-space models have thousands of tokens
NUM_TOKENS = 4
DEFAULT_BLOCK_SIZE = 128
TIMEOUT_S = 60.0
TOLERANCE = 0.25  # largest difference of a token's logprob between two 16-bit computations
# Metrics of pdlaunch's connectors, also in engines of vLLM, and of vLLM's own connector.
BYTES_READ = ("pdlaunch_kv_transfer_bytes_total", "vllm:nixl_bytes_transferred_sum")
SECONDS_READ = ("pdlaunch_kv_transfer_seconds_total", "vllm:nixl_xfer_time_seconds_sum")
FIRST_TOKEN_ID = 100  # ids below are often special tokens
NUM_TOKEN_IDS = 150  # number of ids to draw prompts from; a vocabulary of bytes has them, too
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 10.0
# Removed from prefill's parameters: with this key, vLLM's decode engine reports the tokens that
# prefill had cached, not the tokens that it read itself.
CACHED_AT_PREFILL = "remote_prefill_cached_tokens"
# Number of tokens at the end of a prompt that decode may compute even if it read all KV blocks.
NUM_BACKED_OFF_TOKENS = 16

REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
Pair = TypeVar("Pair", bound=Hashable)

_logger = logging.getLogger(__name__)


class CanaryDied(PdlaunchError):
    """Says why a pair must not be used. ``fatal``: another canary would fail, too."""

    def __init__(
        self, reason: str, *, fatal: bool = False, params: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(reason)
        self.fatal = fatal
        self.params = params or {}


@dataclass(frozen=True, slots=True)
class Proof:
    seconds: float
    num_bytes: int
    transfer_s: float  # time that the engine counted for the READs; 0 if it does not count it
    # Decode's usage shows that it computed none of these tokens. Otherwise the proof is its byte
    # counter, which READs of other requests also increase.
    is_reported: bool = True
    # kv_transfer_params that prefill returned: ``remote_engine_id``, ``remote_host`` and so on.
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gigabytes_per_s(self) -> float | None:
        return self.num_bytes / self.transfer_s / 1e9 if self.transfer_s else None


@dataclass(eq=False)
class Canaries(Generic[Pair]):
    """Sends canaries through pairs, and repeats each until its pair is proven."""

    send: Callable[[Pair], Awaitable[Proof]]
    report: Callable[[Pair, Proof | CanaryDied], None]  # called with each result
    num_at_once: InitVar[int] = 4
    results: dict[Pair, Proof | CanaryDied] = field(default_factory=dict)  # the latest of each pair
    _tasks: dict[Pair, asyncio.Task[None]] = field(default_factory=dict)

    def __post_init__(self, num_at_once: int) -> None:
        self._at_once = asyncio.Semaphore(num_at_once)

    def prove(self, due: Collection[Pair]) -> None:
        """Start canaries for the pairs without a result; cancel the canaries of other pairs."""
        self.forget(self._tasks.keys() - set(due))
        for pair in set(due) - self._tasks.keys() - self.results.keys():
            self._tasks[pair] = asyncio.create_task(self._prove(pair))

    def doubt(self, pairs: Collection[Pair]) -> bool:
        """Drop results, so ``prove`` sends canaries again; return False if there were none."""
        dropped = [self.results.pop(pair, None) for pair in pairs]
        return any(dropped)

    def pairs(self) -> set[Pair]:
        return {*self.results, *self._tasks}

    def forget(self, pairs: Collection[Pair]) -> None:
        """Drop the results of pairs whose engines have changed, and cancel their canaries."""
        self.doubt(pairs)
        for pair in pairs:
            if (task := self._tasks.pop(pair, None)) is not None:
                task.cancel()

    async def close(self) -> None:
        tasks = [*self._tasks.values()]
        self.prove(())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prove(self, pair: Pair) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                async with self._at_once:
                    proof = self.results[pair] = await self.send(pair)
            except CanaryDied as error:
                died = error
            except ProtocolError as error:
                died = CanaryDied(str(error))
            except Exception as error:
                # No answer of an engine may prevent further canaries.
                _logger.exception("a canary cannot be sent")
                died = CanaryDied(f"{type(error).__name__}: {error}")
            else:
                # Before ``report``, which may call ``doubt`` and ``prove`` for this pair.
                del self._tasks[pair]
                self.report(pair, proof)
                return
            self.results[pair] = died
            self.report(pair, died)
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_RETRY_S, 2 * pause_s)


async def send_canary(
    prefill: EngineApi,
    decode: EngineApi,
    model: str,
    *,
    is_exact: bool,
    dp_ranks: tuple[int, int] | None = None,
) -> Proof:
    """Send one canary through a pair. Raises CanaryDied, ProtocolError.

    ``is_exact``: tokens with and without the transfer must be equal; otherwise their logprobs must
    be, within TOLERANCE. ``dp_ranks``: data parallel ranks, prefill first; None: engines have one.
    """
    at_prefill, at_decode = dp_ranks or (None, None)
    started_at = time.monotonic()
    before = await decode.counts(TIMEOUT_S)
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
        request | {"max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}, TIMEOUT_S, at_prefill
    )
    params = handed.get("kv_transfer_params")
    if not params:
        raise CanaryDied(
            "prefill answered without kv_transfer_params: it has no KV connector, or refused",
            fatal=True,
        )
    lent = {name: value for name, value in params.items() if name != CACHED_AT_PREFILL}
    answer = await decode.complete(request | {"kv_transfer_params": lent}, TIMEOUT_S, at_decode)
    alone = await prefill.complete(request, TIMEOUT_S, at_prefill)
    try:
        reason = _difference(answer, alone, is_exact=is_exact)
        num_tokens = num_recomputed(answer)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ProtocolError(f"not an answer with token ids and logprobs: {error!r}") from error
    if reason:
        raise CanaryDied(reason, fatal=True, params=params)
    if num_tokens:
        raise CanaryDied(
            f"decode computed the prompt itself: {num_tokens} tokens though it got their KV blocks",
            params=params,
        )
    after = await decode.counts(TIMEOUT_S)
    num_bytes = int(after.total(*BYTES_READ) - before.total(*BYTES_READ))
    if num_bytes <= 0 and (num_tokens is None or after.has(*BYTES_READ)):
        raise CanaryDied(
            "decode read no byte of the prompt's KV blocks: it computed the prompt itself",
            params=params,
        )
    return Proof(
        time.monotonic() - started_at,
        num_bytes,
        after.total(*SECONDS_READ) - before.total(*SECONDS_READ),
        num_tokens is not None,
        params,
    )


def num_recomputed(answer: Mapping[str, Any]) -> int | None:
    """Return how many prompt tokens decode computed although it got their KV blocks.

    None: the answer does not say, as of vLLM without --enable-prompt-tokens-details, or of a chunk
    before the last. Raises one of ``MALFORMED``.
    """
    usage = answer.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None:
        return None
    num_tokens: int = usage["prompt_tokens"] - cached
    return num_tokens if num_tokens > NUM_BACKED_OFF_TOKENS else 0


def _new_prompt(counts: Counts) -> list[int]:
    told = counts.label("vllm:cache_config_info", "block_size") or ""
    block_size = int(told) if told.isdecimal() and int(told) else DEFAULT_BLOCK_SIZE
    # A new prompt each time: if decode had it in its cache, it would read no KV blocks.
    draw = random.SystemRandom()
    # One more token: decode always computes the last token of a prompt itself.
    length = min(NUM_BLOCKS * block_size, MOST_TOKENS) + 1
    return [FIRST_TOKEN_ID + draw.randrange(NUM_TOKEN_IDS) for _ in range(length)]


def _difference(answer: Mapping[str, Any], alone: Mapping[str, Any], *, is_exact: bool) -> str:
    """Return how decode's tokens differ from those of prefill alone; empty if they do not."""
    told, expected = answer["choices"][0], alone["choices"][0]
    ids, expected_ids = list(told["token_ids"]), list(expected["token_ids"])
    if is_exact:
        if ids == expected_ids:
            return ""
        return (
            f"decode answered tokens {ids}, prefill alone {expected_ids}: decode computes with "
            "wrong KV blocks"
        )
    logprobs, others = (one["logprobs"]["token_logprobs"] for one in (told, expected))
    # After a different token, later tokens have another context and cannot be compared.
    for token, other, logprob, other_logprob in zip(
        ids, expected_ids, logprobs, others, strict=True
    ):
        if not math.isclose(logprob, other_logprob, abs_tol=TOLERANCE):
            return (
                f"logprobs {logprob:.3f} (decode) and {other_logprob:.3f} (prefill alone) differ "
                f"by more than {TOLERANCE}"
            )
        if token != other:
            break
    return ""
