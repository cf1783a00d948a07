"""Says what the steps of an engine cost and how much work waits for them, on the wire and in use.

The engine's scheduler and the router compute with the same values, so that the router knows in
which chunks an engine would compute a prompt.
"""

from __future__ import annotations

import math

import msgspec

ROUTE_HEADER = "X-Pdlaunch-Route"
"""Tells a client which engines have served it. With the value ``pair`` in a request it asks for a
prefill and a decode engine, whatever that costs, as those do who look at what moves between them.
"""
WANTS_PAIR = "pair"
MAX_SLOWDOWN = 2.0
"""An engine of one role without ``max_itl_ms`` lets the chunk of a prompt make a step at most so
many times as long as its streams alone do, or as long as its launches; ``StreamPauses`` are the
exception. Twice is what steady streams are held to: the 99th percentile of the time between tokens,
beside the median.
"""


class StepWork(msgspec.Struct, frozen=True, kw_only=True):
    """Counts what one step computes."""

    num_streams: int = 0
    """Rows that compute the one token after those so far."""
    context_tokens: int = 0
    """Tokens so far of these rows, which they attend to."""
    prompt_tokens: int = 0
    attended_tokens: float = 0.0
    """Sum over the prompt tokens of the tokens before them."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens that are computed."""
        return self.num_streams + self.prompt_tokens

    @property
    def is_mixed(self) -> bool:
        """Return whether prompts are computed beside streams."""
        return self.num_streams > 0 and self.prompt_tokens > 0

    @property
    def features(self) -> tuple[float, float, float, float, float]:
        """Return what the step is charged for, in the order of ``StepCosts``."""
        return (
            1.0,
            self.num_streams,
            self.context_tokens,
            self.prompt_tokens,
            self.attended_tokens,
        )


class StepCosts(msgspec.Struct, frozen=True, array_like=True):
    """Says how long a step takes: the sum of these seconds, each times what it is for; with streams
    and prompts ``launches_s`` at least.
    """

    step_s: float
    """Any step."""
    stream_s: float
    context_s: float
    prompt_s: float
    attended_s: float
    launch_s: float = 0.0
    """The least that a step with streams and prompts takes whose kernels a GPU is given one by one.
    0: on a CPU.
    """
    graph_tokens: int = 0
    """Steps with prompts of up to so many tokens in all are one CUDA graph, as are steps of streams
    alone, which takes as long as its tokens do.
    """

    def launches_s(self, num_tokens: float) -> float:
        """Return the least that a step takes that has streams, prompts, and so many tokens in
        all.
        """
        return self.launch_s if num_tokens > self.graph_tokens else 0.0

    def seconds(self, work: StepWork) -> float:
        """Return the time that a step with this work takes."""
        values = (self.step_s, self.stream_s, self.context_s, self.prompt_s, self.attended_s)
        computed_s = sum(
            cost * number for cost, number in zip(values, work.features, strict=True) if number
        )
        if not work.is_mixed:
            return computed_s
        return max(self.launches_s(work.num_tokens), computed_s)

    def decode_s(self, num_streams: float, context_tokens: float) -> float:
        """Return the time of a step that computes the next tokens of streams and nothing else."""
        return self.step_s + self.stream_s * num_streams + self.context_s * context_tokens

    def tokens_s(self, num_tokens: float, num_before: float = 0.0) -> float:
        """Return by how much prompt tokens behind ``num_before`` others lengthen their steps."""
        return self.prompt_s * num_tokens + self.attended_s * num_tokens * (
            num_before + num_tokens / 2
        )

    def prompts_s(self, num_tokens: float) -> float:
        """Return the time of a step that computes prompt tokens and nothing else."""
        return self.step_s + self.tokens_s(num_tokens)


class EngineCosts(msgspec.Struct, frozen=True, array_like=True):
    """Says what an engine's work costs, and the limits that its scheduler keeps."""

    steps: StepCosts
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_tokens: int
    """Tokens for which the KV cache has room."""
    kv_bytes_per_token: int
    """Bytes that a pull moves for a token, over all ranks."""
    max_itl_s: float | None = None
    """A step with streams takes no longer because of prompts, but for a block and for launches."""
    max_slowdown: float | None = None
    """The same as a multiple of the step without prompts, where ``max_itl_s`` is None."""

    def named(self) -> dict[str, float | None]:
        """Return all values by name."""
        values = msgspec.structs.asdict(self)
        return msgspec.structs.asdict(values.pop("steps")) | values

    @property
    def most_long_gaps(self) -> int:
        """Return how many gaps between tokens may be long at once: none where ``max_itl_s`` is
        stated, or steps may be as long as they get.
        """
        bounded = self.max_itl_s is None and self.max_slowdown is not None
        return self.max_num_seqs if bounded else 0

    def most_tokens(self, num_streams: int) -> int:
        """Return how many prompt tokens a step has room for beside its streams."""
        return max(self.block_size, self.max_num_batched_tokens - num_streams)

    def pause_chunk(self, num_before: float = 0.0) -> int:
        """Return how many prompt tokens, behind ``num_before`` others of their prompt, a step
        computes while streams wait: as many as fit into it, fewer where such a step would take
        longer than streams may wait, but for a block.
        """
        most_s, attended_s = StreamPauses.MAX_S, self.steps.attended_s
        first_s = self.steps.prompt_s + attended_s * num_before
        if first_s <= 0:
            return self.max_num_batched_tokens
        # The n for which tokens_s(n, num_before) is most_s.
        in_time = 2 * most_s / (first_s + math.sqrt(first_s**2 + 2 * attended_s * most_s))
        return min(self.max_num_batched_tokens, max(self.block_size, math.ceil(in_time)))

    @property
    def pause_tokens(self) -> int:
        """Return how many prompt tokens are computed while streams wait once."""
        chunk_tokens = self.pause_chunk()
        step_s = self.steps.prompts_s(chunk_tokens)
        num_steps = math.ceil(StreamPauses.MAX_S / step_s) if step_s > 0 else 1
        return num_steps * chunk_tokens

    def chunk_tokens(self, num_streams: int, context_tokens: float, num_before: float = 0.0) -> int:
        """Return beside how many prompt tokens, behind ``num_before`` others of their prompt, a
        step of streams is no long one.

        At least a block; where even that is too much for a CUDA graph, what is computed while
        kernels are launched anyway. An engine without streams computes as many as fit into a step.
        """
        limit = self.max_itl_s is not None or self.max_slowdown is not None
        if not limit or num_streams == 0 or self.steps.prompt_s <= 0:
            return self.most_tokens(num_streams)
        alone_s = self.steps.decode_s(num_streams, context_tokens)
        allowed_s = (
            self.max_itl_s if self.max_itl_s is not None else alone_s * (self.max_slowdown or 1.0)
        )
        token_s = self.steps.prompt_s + self.steps.attended_s * num_before
        in_graph = self.steps.graph_tokens - num_streams
        if in_graph < self.block_size:
            allowed_s = max(allowed_s, self.steps.launch_s)
        fits = math.floor((allowed_s - alone_s) / token_s)
        if fits > in_graph >= self.block_size and allowed_s < self.steps.launch_s:
            fits = in_graph
        return max(self.block_size, min(fits, self.most_tokens(num_streams)))


class StreamPauses:
    """Lets the streams of an engine wait while the prompts of a burst are computed at full speed.

    ::

        streams   | | | | |               | | | | |       a line is a step
        prompts             8,192 │ 8,192                 steps without streams, and faster for it

    Each stream gets one token late, however many prompts that were. Few such gaps change no
    percentile that people look at; when these are used up, prompts are computed in chunks.
    """

    SHARE = 0.0075
    """Gaps that may be long, of all: three quarters of those above the 99th percentile."""
    MOST_CHUNKS = 2
    """Prompts of so many chunks are computed beside streams: as many gaps that are a little longer
    are better than a long one.
    """
    MAX_S = 0.3
    """No step begins without the streams when they have waited so long. It lets two full steps of
    prompts through on a GPU (8,192 tokens of an 8B model take 0.17 to 0.22 s): with one, a burst
    takes twice as many late tokens.
    """

    def __init__(self, most: int) -> None:
        """``most``: so many long gaps may come at once, which is so at the start."""
        self.num_left = float(most)
        self._most = most
        self._waited_s: float | None = None

    @classmethod
    def are_for(cls, num_prompt_tokens: float, chunk_tokens: int) -> bool:
        """Return whether prompts are long enough for streams to wait for them."""
        return num_prompt_tokens > cls.MOST_CHUNKS * chunk_tokens

    @property
    def has_begun(self) -> bool:
        """Return whether streams wait: their next step computes nothing else, so that the gap is no
        longer than the pause and a step.
        """
        return self._waited_s is not None

    def leave_out(self, num_streams: int, num_prompt_tokens: int, chunk_tokens: int) -> bool:
        """Return whether the next step is to hold prompts alone, of which there are so many tokens.

        ``chunk_tokens``: the next step with streams has room for them.
        """
        if not num_streams:
            self._waited_s = None
            return False
        if self._waited_s is not None:
            return num_prompt_tokens > 0 and self._waited_s < self.MAX_S
        return self.are_for(num_prompt_tokens, chunk_tokens) and self.num_left > 0

    def ran_prompts(self, seconds: float) -> None:
        """Count a step from which streams were left out.

        One that seems to take no time ends the pause: nobody knows how long that would last.
        """
        self._waited_s = (self._waited_s or 0.0) + (seconds if seconds > 0 else self.MAX_S)

    def ran_streams(self, num_streams: int) -> None:
        """Count a step with all streams, which ends a pause."""
        if self._waited_s is not None:
            self._waited_s = None
            self.num_left -= num_streams
        self.num_left = min(self.num_left + self.SHARE * num_streams, self._most)


class EngineReport(msgspec.Struct, frozen=True, array_like=True):
    """Tells a router what an engine has to do after a step, with the tokens of that step."""

    waiting_tokens: int
    """Tokens of prompts that are here and not computed yet."""
    num_streams: int
    """Requests that decode."""
    context_tokens: int
    """Tokens of these."""
    free_tokens: int
    """Tokens for which the KV cache has room without taking it from anybody.

    No router reads it; it keeps its place for ``pdlaunch router`` of other versions, which find
    what follows by its position.
    """
    costs: EngineCosts | None = None
    long_gaps: float = 0.0
    """Gaps between tokens of its streams that may be long; see ``StreamPauses``."""
    stream_seconds: float = 0.0
    """Time of its steps so far, each times the streams in it."""
