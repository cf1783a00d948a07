"""Defines the messages between an engine's server (ZMQ DEALER) and its rank 0 (ROUTER).

A request is one prompt with one choice: the server splits ``n`` choices and lists of prompts into
several requests. Each request ends with exactly one ``RequestFinished``.
"""

from typing import Literal

from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.ids import NO_ORIGIN, PromptOrigin, RequestId
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.kv_params import RemoteKV, TokenOutput
from pdlaunch.protocol.wire import Codec, Message

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(Message, tag=False):
    """How tokens are drawn. A token depends only on the logits and (seed, choice, index)."""

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
    # Tokens that end the request; they include the model's end tokens unless ignore_eos is set.
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()  # the model's; masked with stop_token_ids until min_tokens
    seed: int = 0
    choice: int = 0
    num_top_logprobs: int | None = None  # None: no logprobs; 0: only that of the token itself
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    grammar: str = ""  # grammar of llguidance that the output has to match

    @property
    def needs_output(self) -> bool:
        """Return True if earlier output tokens change the logits: a draw needs them on the host."""
        return any((self.presence_penalty, self.frequency_penalty, self.repetition_penalty != 1.0))


class AddRequest(Message):
    request_id: RequestId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output: list[TokenOutput] = []  # tokens of this choice so far, made by another engine
    # Keep the KV blocks under a lease after the last token and answer with kv_transfer_params.
    do_remote_decode: bool = False
    num_readers: int = 1  # choices that will pull the leased blocks
    remote_kv: RemoteKV | None = None  # where to pull the prompt's KV blocks from
    cache_salt: str = ""
    priority: int = 0  # lower first
    origin: PromptOrigin = NO_ORIGIN  # the same for all choices and attempts; below 2^63
    # A rank died while it computed this request. A step has at most one suspect, and clears it.
    is_suspect: bool = False
    records_spans: bool = False


class AbortRequest(Message):
    """Drop the request, or end the lease of a finished one. Unknown ids are ignored."""

    request_id: RequestId


class Hello(Message):
    """First message of a server; rank 0 aborts the requests of the previous server."""


class CheckIntegrity(Message):
    """Check that every KV block has its owner; answered with one IntegrityReport."""

    call_id: int = 0  # set by the link that sends it


class ReadStats(Message):
    """Send the next EngineStats now."""


class Sleep(Message):
    """Free the memory of weights and KV cache; answered with one SleepReply.

    The server sends no new request after it. The engine falls asleep when no request, lease or
    transfer holds a block any more.
    """

    level: int  # 1 keeps the weights in host memory; 2 reads them again at wake-up
    timeout_s: float  # seconds to wait for running work; 0: refuse at once while any runs
    call_id: int = 0  # set by the link that sends it


class WakeUp(Message):
    """Allocate the freed memory again; answered with one SleepReply."""

    call_id: int = 0  # set by the link that sends it
    tags: list[str] = []  # pools to wake up; empty: all


ToRank = AddRequest | AbortRequest | Hello | CheckIntegrity | ReadStats | Sleep | WakeUp


class Tokens(Message):
    """New output of a request that is not finished."""

    request_id: RequestId
    tokens: list[TokenOutput]
    prompt: list[TokenOutput] = []  # with the first token: the prompt's tokens, if asked for
    spans: SpanReport | None = None  # with the first tokens: the spans so far, if asked for


class RequestFinished(Message):
    """Ends a request, once, with the tokens that were not sent yet."""

    request_id: RequestId
    reason: FinishReason
    tokens: list[TokenOutput] = []
    prompt: list[TokenOutput] = []
    stop_token_id: int | None = None  # the stop token, if one ended it; the last of its tokens
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens from the prefix cache and pulled blocks
    # Where the leased blocks can be pulled from; None if no choice needs decoding.
    remote_kv: RemoteKV | None = None
    spans: SpanReport | None = None  # spans since the first tokens


class Welcome(Message):
    """Answers Hello with facts about the engine."""

    num_blocks: int
    max_model_len: int  # prompt plus output, in tokens, that the KV cache can hold
    # Pools that sleep; the engine accepts no request until all are awake.
    sleeping_tags: list[str] = []


class Outputs(Message):
    items: list[Tokens | RequestFinished]


class HistogramSeries(Message, tag=False):
    """Counts values by bucket; the last bucket counts those above all bounds."""

    name: str  # key in ``observe.counters.HISTOGRAMS``
    labels: tuple[str, ...]  # values of the labels named there
    counts: list[int]
    sum: float = 0.0


class EngineStats(Message):
    """Statistics of an engine; sent about once a second, and when the server asks (ReadStats).

    A rank that stops sending them hangs. Fields named ``num_`` are current values, the others are
    totals since the start of the rank.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_kv: int = 0
    num_leased_requests: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_leased_blocks: int = 0
    num_quarantined_blocks: int = 0
    num_host_blocks: int = 0  # capacity of the host tier, in blocks of any group
    num_used_host_blocks: int = 0
    num_offload_jobs: int = 0
    counts: dict[str, float] = {}  # name in ``observe.counters.COUNTERS`` -> total
    histograms: list[HistogramSeries] = []  # empty in the answer to CheckIntegrity


class IntegrityReport(Message):
    call_id: int
    error: str | None  # the invariant that is violated; None: all hold
    stats: EngineStats


class SleepReply(Message):
    call_id: int
    sleeping_tags: list[str]  # pools that sleep now; also after an error
    num_bytes: int = 0  # device memory freed or allocated, over all ranks
    error: str | None = None


FromRank = Outputs | Welcome | EngineStats | IntegrityReport | SleepReply | KVBlocks

to_rank: Codec[ToRank] = Codec(ToRank)
from_rank: Codec[FromRank] = Codec(FromRank)
