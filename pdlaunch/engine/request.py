"""Describes one request inside the scheduler, from its message on."""

from __future__ import annotations

import enum
from typing import NamedTuple

from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.engine.kvcache.manager import BlockTables, KVCacheManager
from pdlaunch.engine.request_spans import RequestSpans
from pdlaunch.protocol.engine import AddRequest, FinishReason
from pdlaunch.protocol.ids import PullId, RequestId
from pdlaunch.protocol.process.step_record import SUSPECT_BIT


class Phase(enum.Enum):
    """Says where a request stands, and what it owns.

    WAITING ──▶ RUNNING ──▶ FINISHED        every phase may end in FINISHED (abort, error)
     │ ▲  ▲      │  ▲
     │ │  └──────┘  │     preempted: has to find, load or compute all its tokens again
     │ └───────┐    │
     ▼         │    │
    LOADING ─▶ READY┤     a failed load or pull leads back to WAITING, a preempted READY too;
    PULLING ─▶ READY┘     so does a load that some blocks are left to be pulled after
    """

    WAITING = "waiting"
    """It is queued and owns no block."""
    LOADING = "loading"
    """It waits for blocks from host memory. It owns the cached blocks it shares; the others belong
    to the load.
    """
    PULLING = "pulling"
    """It waits for KV, which may still be computed elsewhere. It owns the cached blocks it shares;
    the others belong to the pull.
    """
    READY = "ready"
    """It is queued and owns the blocks of its computed tokens."""
    RUNNING = "running"
    """It is in the batch and owns a row and blocks."""
    FINISHED = "finished"


class RequestTimes:
    """Holds the instants of one request; ``Histograms`` sets and reads them."""

    __slots__ = (
        "arrived_at", "first_at", "last_at", "num_drawn", "num_preemptions", "started_at"
    )  # fmt: skip

    def __init__(self) -> None:
        self.arrived_at = 0.0
        self.started_at: float | None = None
        self.first_at: float | None = None
        """Instant of the first token drawn here."""
        self.last_at: float | None = None
        self.num_drawn = 0
        self.num_preemptions = 0


class CachedTokens(NamedTuple):
    """Counts prompt tokens by where they were found."""

    device: int
    host: int
    remote: int


class Request:
    """Holds the state of one request.

    ``token_ids`` is prompt and output; its first ``num_computed`` tokens are in the KV cache.
    """

    __slots__ = (
        "arrival",
        "block_hasher",
        "is_suspect",
        "load_id",
        "mark",
        "may_load",
        "message",
        "num_cached_tokens",
        "num_computed",
        "num_host_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_remote_tokens",
        "num_sent_blocks",
        "num_unknown",
        "output_limit",
        "phase",
        "pull_id",
        "row",
        "spans",
        "tables",
        "times",
        "token_ids",
        "wants_pull",
    )

    def __init__(
        self,
        message: AddRequest,
        arrival: int,
        output_limit: int,
        tables: BlockTables,
        hasher: TokenHasher,
    ) -> None:
        self.message = message
        self.arrival = arrival
        """Position in the order of arrival; the queue keeps it through preemption."""
        self.output_limit = output_limit
        """Output tokens after which it ends: max_tokens, or what max_model_len leaves."""
        self.token_ids = message.prompt_token_ids + [token.token_id for token in message.output]
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.num_computed = 0
        self.num_in_flight = 0
        """Tokens after the computed ones that launched steps compute. Row and blocks stay with
        these steps until they are collected.
        """
        self.num_unknown = 0
        """Output tokens that launched steps draw; the host learns of them when it collects
        these.
        """
        self.num_cached_tokens: int | None = None
        """Prompt tokens that were found or brought, and not computed, before its first step here;
        None until that is known.
        """
        self.phase = Phase.WAITING
        self.tables = tables
        self.times = RequestTimes()
        self.block_hasher = hasher
        self.num_registered_blocks = 0
        """Logical blocks that the prefix cache has been told of."""
        self.row: int | None = None
        self.num_sent_blocks: int | None = None
        """Logical blocks that the ranks know of; None while they do not know the row."""
        self.wants_pull = message.remote_kv is not None
        """The prefill side still counts this request as a reader of its lease."""
        self.num_remote_tokens = 0
        """Prompt tokens that a pull has brought."""
        self.pull_id: PullId | None = None
        self.may_load = True
        """Once a load has ended, well or not, the host is asked again only after preemption."""
        self.num_host_tokens = 0
        """Prompt tokens that came from host memory."""
        self.load_id: int | None = None
        self.is_suspect = message.is_suspect
        """A rank may have died of it; False once a step has drawn a token for it here."""
        self.mark = message.origin | (SUSPECT_BIT if message.is_suspect else 0)
        """The number that stands for the request in the record of steps."""
        self.spans = RequestSpans(message.records_spans)

    @property
    def request_id(self) -> RequestId:
        return self.message.request_id

    @property
    def cached_tokens(self) -> CachedTokens:
        """Return where the prompt tokens come from that were not computed here."""
        num_cached = self.num_cached_tokens or 0
        num_remote = min(self.num_remote_tokens, num_cached)
        num_host = min(self.num_host_tokens, num_cached - num_remote)
        return CachedTokens(num_cached - num_remote - num_host, num_host, num_remote)

    @property
    def has_begun(self) -> bool:
        """Return whether it has ever owned blocks, or waits for some."""
        return self.phase is not Phase.WAITING or self.num_cached_tokens is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Return how many known tokens are not computed yet; 1 while the request decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_scheduled(self) -> int:
        """Return how many tokens are computed or in flight: the next step begins after them."""
        return self.num_computed + self.num_in_flight

    @property
    def num_to_schedule(self) -> int:
        """Return how many tokens no step computes yet; 1 while the request decodes."""
        return len(self.token_ids) + self.num_unknown - self.num_computed - self.num_in_flight

    @property
    def ends_in_flight(self) -> bool:
        """Return whether the steps in flight draw its last token, whichever that is."""
        return (
            self.num_unknown > 0 and self.num_output_tokens + self.num_unknown >= self.output_limit
        )

    @property
    def draws_from_its_output(self) -> bool:
        """Return whether the host has to know a token before the next is drawn, as penalties do."""
        sampling = self.message.sampling
        return sampling.repetition_penalty != 1.0 or bool(
            sampling.presence_penalty or sampling.frequency_penalty
        )

    @property
    def num_pulled_tokens(self) -> int:
        """Return how many tokens count as computed after a pull: the whole prompt.

        A request without an output token computes its last prompt token here.
        """
        return self.num_prompt_tokens - (self.num_output_tokens == 0)

    def survive(self) -> None:
        """Note that a step has drawn a token for the request: no rank died of that step."""
        self.is_suspect = False
        self.mark = self.message.origin

    def prompt_hashes(self) -> list[bytes]:
        """Return the hashes of the prompt's blocks, 32 bytes each, which prove a hand-over."""
        return self.block_hasher.prompt_hashes(self.token_ids, self.num_prompt_tokens)

    def end_of(self, token_id: int) -> FinishReason | None:
        """Return why the request ends with ``token_id``: ``stop``, ``length``, or None when it goes
        on.
        """
        sampling = self.message.sampling
        if token_id in sampling.stop_token_ids and self.num_output_tokens >= sampling.min_tokens:
            return "stop"
        return "length" if self.num_output_tokens >= self.output_limit else None


class Intake:
    """Makes the requests of an engine, and refuses those that exceed its limits."""

    def __init__(
        self, kv: KVCacheManager, *, block_size: int, max_model_len: int, model_digest: str
    ) -> None:
        self._kv = kv
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._model_digest = model_digest
        self._num_arrived = 0

    def new_request(self, message: AddRequest) -> Request:
        """Return the next request in order of arrival."""
        output_limit = min(
            message.sampling.max_tokens, self._max_model_len - len(message.prompt_token_ids)
        )
        if message.do_remote_decode:
            # The lease is on the prompt: later tokens would push its blocks out of the windows.
            output_limit = min(output_limit, 1)
        hasher = TokenHasher(
            root_hash(self._model_digest, cache_salt=message.cache_salt), self._block_size
        )
        self._num_arrived += 1
        return Request(message, self._num_arrived, output_limit, self._kv.new_tables(), hasher)

    def refusal(self, request: Request) -> str | None:
        """Return why this engine can never serve the request; None when it can."""
        if request.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if request.num_prompt_tokens >= self._max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens, max_model_len is "
                f"{self._max_model_len}: "
                "no room for an output token; shorten the prompt or raise max_model_len"
            )
        # The last output token is never computed.
        num_tokens = request.num_prompt_tokens + request.output_limit - 1
        num_needed, num_blocks = self._kv.min_blocks(num_tokens), self._kv.pool.num_blocks
        if num_needed > num_blocks:
            return (
                f"the request's {num_tokens} tokens need {num_needed} KV blocks, the engine has "
                f"{num_blocks}; "
                "lower max_tokens or raise kv_cache_memory"
            )
        return None
