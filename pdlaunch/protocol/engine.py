"""Defines the messages between an engine's server (ZMQ DEALER) and its rank 0 (ROUTER).

A request is one prompt and one choice; the server splits ``n`` choices and lists of prompts. Each
request ends in exactly one ``RequestFinished``.
"""

from __future__ import annotations

from typing import Literal

from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.ids import NO_ORIGIN, PromptOrigin, RequestId
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.kv_params import RemoteKV, TokenOutput
from pdlaunch.protocol.wire import Codec, Message

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(Message, tag=False):
    """Says how tokens are drawn: a pure function of the logits and (seed, choice, index)."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    # Tokens that end the request; those of the model are among them unless ignore_eos.
    stop_token_ids: tuple[int, ...] = ()
    # The model's end tokens; masked, as stop_token_ids are, before min_tokens.
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    choice: int = 0
    num_top_logprobs: int | None = None  # none: no logprobs; 0: only of the token itself
    num_prompt_logprobs: int | None = None  # the same of the prompt's tokens
    grammar: str = ""  # of llguidance; the output has to fit it


class AddRequest(Message):
    request_id: RequestId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output: list[TokenOutput] = []  # what this choice has, from prefill or before a migration
    # Keep the KV blocks under a lease after the last token and answer with kv_transfer_params.
    do_remote_decode: bool = False
    num_readers: int = 1  # choices that will pull the leased blocks
    remote_kv: RemoteKV | None = None  # pull the prompt's KV blocks from there
    cache_salt: str = ""
    priority: int = 0  # lower first
    origin: PromptOrigin = NO_ORIGIN  # the same for all choices and attempts; below 2^63
    # Computed by a rank that died. A step has at most one suspect; surviving a step clears it.
    is_suspect: bool = False
    records_spans: bool = False


class AbortRequest(Message):
    """Drop the request, or end the lease of a finished one. Unknown ids are ignored."""

    request_id: RequestId


class Hello(Message):
    """Opens the connection of a server; requests of the server before it are aborted."""


class CheckIntegrity(Message):
    """Prove the owner of every KV block; answered with one IntegrityReport."""

    call_id: int = 0  # given by the link when it is sent


class ReadStats(Message):
    """Send the next EngineStats now."""


class Sleep(Message):
    """Give the memory of weights and KV cache back; answered with one SleepReply.

    No new request comes after it. The engine falls asleep when no request, lease or transfer holds
    a block any more.
    """

    level: int  # 1 keeps the weights in host memory, 2 reads them again on waking
    timeout_s: float  # seconds to wait for what still runs; 0: refuse at once
    call_id: int = 0  # given by the link when it is sent


class WakeUp(Message):
    """Take the memory back; answered with one SleepReply."""

    call_id: int = 0  # given by the link when it is sent
    tags: list[str] = []  # pools to wake up; none: all


ToRank = AddRequest | AbortRequest | Hello | CheckIntegrity | ReadStats | Sleep | WakeUp


class Tokens(Message):
    """Carries new output of a request that goes on."""

    request_id: RequestId
    tokens: list[TokenOutput]
    prompt: list[TokenOutput] = []  # with the first token: the prompt's, if asked for
    spans: SpanReport | None = None  # so far, with the first tokens, where they were asked for


class RequestFinished(Message):
    """Ends a request, once, with the tokens not sent before."""

    request_id: RequestId
    reason: FinishReason
    tokens: list[TokenOutput] = []
    prompt: list[TokenOutput] = []
    stop_token_id: int | None = None  # the token that ended it (it is the last of the tokens)
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens from the prefix cache and pulled blocks
    # Where the leased blocks can be pulled from; None when nothing is left to decode.
    remote_kv: RemoteKV | None = None
    spans: SpanReport | None = None  # since the first tokens


class Welcome(Message):
    """Answers Hello: what the server must know of the engine."""

    num_blocks: int
    max_model_len: int  # prompt plus output, in tokens, that the KV cache can hold
    # Pools that sleep: the engine serves nothing before all are awake.
    sleeping_tags: list[str] = []


class Outputs(Message):
    items: list[Tokens | RequestFinished]


class HistogramSeries(Message, tag=False):
    """Counts values by bucket; the last bucket has those above all bounds."""

    name: str  # in ``observe.counters.HISTOGRAMS``
    labels: tuple[str, ...]  # values of the labels that it has there
    counts: list[int]
    sum: float = 0.0


class EngineStats(Message):
    """Counts what the engine does; sent about once a second, and when the server asks (ReadStats).

    Silence means that the rank hangs. Fields named ``num_`` are present numbers, the others totals
    since the rank started.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_kv: int = 0
    num_leased_requests: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_leased_blocks: int = 0
    num_quarantined_blocks: int = 0
    num_host_blocks: int = 0  # room of the host tier, in blocks of any group
    num_used_host_blocks: int = 0
    num_offload_jobs: int = 0
    counts: dict[str, float] = {}  # totals, by the names of ``observe.counters.COUNTERS``
    histograms: list[HistogramSeries] = []  # not in the answer to CheckIntegrity


class IntegrityReport(Message):
    call_id: int
    error: str | None  # says what does not hold; None: everything does
    stats: EngineStats


class SleepReply(Message):
    call_id: int
    sleeping_tags: list[str]  # pools that sleep now; also after an error
    num_bytes: int = 0  # device memory given back or taken, over all ranks
    error: str | None = None


FromRank = Outputs | Welcome | EngineStats | IntegrityReport | SleepReply | KVBlocks

to_rank: Codec[ToRank] = Codec(ToRank)
from_rank: Codec[FromRank] = Codec(FromRank)
