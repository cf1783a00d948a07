"""Learns what the steps of this engine cost: from the warm-up, then from steps as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.engine.kvcache.groups import KVCacheLayout
from pdlaunch.engine.step import StepPlan
from pdlaunch.observe.online_fit import MAX_SURPRISE, NOISE, OnlineFit
from pdlaunch.protocol.costs import MAX_SLOWDOWN, EngineCosts, StepCosts, StepWork

_STREAM_DOUBT = (1.0, 0.1, 0.0)
_PROMPT_DOUBT = (0.1, 0.0)
"""Seconds by which costs may be wrong before anything is measured: more than any machine takes. The
warm-up does not tell what attention costs: contexts would have to be long, and steps that other
programs disturb would make long ones seem to take minutes.
"""
_STREAM_DOUBT_AFTER = (0.2, 0.1, 1.0)
_PROMPT_DOUBT_AFTER = (0.2, 1.0)
"""The same after the warm-up, as shares of any step and of a token, or of all that the fastest
prompt took for each of its tokens: other engines on the machine warm up at the same time.
"""
_STREAM_DRIFTS = (True, True, False)
_PROMPT_DRIFTS = (True, False)
"""Requests that are all alike do not tell what attention costs from what tokens and steps cost:
left to drift, the two would take each other's place, and be wrong for the next length.
"""
_BEST_ATTENTION = 0.5
"""Attention begins with this share of what ``AttentionShares`` say. That of prompts takes no less.
"""
_LEAST_SHARE = 0.1
"""Prompts of which a step with streams tells something take this share of it at least."""
_LITTLE = 0.01
"""Share of a step that its prompts are taken to cost, where they seem to cost nothing."""
_MANY = 2.0
"""Tokens that take so many times as long as launches, by the warm-up, tell what tokens cost."""
_MOST_NEEDED = 0.25
"""Share of a full step that is many tokens in any case."""
_MOST_LAUNCHES = 3.0
"""Launches are never taken for slower than so many times what the warm-up has measured."""
_LAUNCHED = 0.9
"""Streams and tokens that should take less than this share of a step were not what it took so long
for.
"""
_FASTER_SHARE, _SLOWER_SHARE = 0.3, 0.1
"""Each step counts so much in what launches are taken to cost: nothing makes a step faster than it
is, and much makes it slower.
"""


class AttentionShares(NamedTuple):
    """Tells what attention should cost beside the rest of a model, by its shape."""

    attended: float = 1e-4
    """Arithmetic for a token that is attended to, as a share of all other for a token."""
    context: float = 1e-5
    """Memory of a token of a stream's context, as a share of the weights that a step reads."""

    @classmethod
    def of(cls, shape: ModelShape, max_model_len: int) -> AttentionShares:
        """Return those of a model. A layer with a window counts by the part of the longest request
        that it attends to: the costs grow with each token, and are then right at its end.
        """
        embeddings = shape.vocab_size * shape.hidden_size
        num_weights = shape.num_parameters - shape.num_idle_parameters
        num_weights -= embeddings if shape.tie_word_embeddings else 2 * embeddings
        num_layers = sum(
            1.0 if window is None else min(1.0, window / max_model_len)
            for window in shape.layer_windows
        )
        # Keys and values; each is multiplied once, as each weight is.
        per_head = 2 * shape.head_dim * num_layers / max(1, num_weights)
        return cls(per_head * shape.num_attention_heads, per_head * shape.num_kv_heads)


def work_of(plan: StepPlan) -> StepWork:
    """Count what a plan computes; a row of one token is taken for a stream."""
    num_streams = context_tokens = prompt_tokens = 0
    attended_tokens = 0.0
    for item in plan.scheduled:
        if item.num_tokens == 1:
            num_streams += 1
            context_tokens += item.num_computed_tokens
        else:
            prompt_tokens += item.num_tokens
            attended_tokens += item.num_tokens * (item.num_computed_tokens + item.num_tokens / 2)
    return StepWork(
        num_streams=num_streams,
        context_tokens=context_tokens,
        prompt_tokens=prompt_tokens,
        attended_tokens=attended_tokens,
    )


class StepModel:
    """Fits the costs of steps to what steps took; lives in rank 0.

    Steps without prompts tell what streams cost, those with prompts what these add: a long step of
    prompts that takes a little longer than it should says nothing of the few streams in it.

    Where launches were measured, only many tokens tell what tokens cost, and few at most that they
    cost less than it seemed. A short chunk takes as long as its launches: were it taken for dear
    tokens, the next one would be shorter, and its tokens seem dearer still, until prompts hardly
    go on.
    """

    def __init__(
        self,
        limits: EngineCosts,
        measured: Sequence[tuple[StepWork, float]],
        shares: AttentionShares | None = None,
    ) -> None:
        """``limits``: what is no cost of these is taken over as it is. ``measured``: in the
        warm-up, steps with streams and prompts without CUDA graphs. ``shares``: None for some that
        are usual.
        """
        self._limits = limits
        self._graph_tokens = limits.steps.graph_tokens
        self.stream_seconds = 0.0
        """Time of the steps so far, each times the streams in it."""
        self._shares = shares or AttentionShares()
        self._streams = OnlineFit([0.0] * 3, _STREAM_DOUBT, _STREAM_DRIFTS)
        """Finds the seconds of any step, of a stream, and of contexts that take as much memory as
        the weights do. The last are no part of the first: a step of a small model takes what its
        launches do, and contexts may take a tenth of what its memory says.
        """
        self._prompts = OnlineFit([0.0] * 2, _PROMPT_DOUBT, _PROMPT_DRIFTS)
        """Finds the seconds of a token, and by how much attention takes longer than its least, as
        seconds of the token that takes as much arithmetic. So what makes tokens cheaper makes
        attention cheaper.
        """
        self._launch_s = 0.0
        """Stays so where the warm-up has not measured it."""
        self._most_launch_s = self._many_tokens = 0.0
        # The longest prompts first: of a short one most is what any step takes.
        for work, seconds in sorted(measured, key=lambda one: (one[0].prompt_tokens > 0, -one[1])):
            if not work.is_mixed:
                self.observe(work, seconds)
        step_s, token_s = self._streams.coefficients[0], self._prompts.coefficients[0]
        self._streams.coefficients[2] = _BEST_ATTENTION * step_s
        # Where nothing was measured, attention has to be learned as all else has.
        doubted_s = step_s or _STREAM_DOUBT[0]
        self._streams.doubt([share * doubted_s for share in _STREAM_DOUBT_AFTER])
        # A prompt seems to cost next to nothing where the streams alone were disturbed.
        tokens_s = [
            seconds / work.prompt_tokens for work, seconds in measured if work.prompt_tokens
        ]
        doubted_s = max(token_s, min(tokens_s, default=_PROMPT_DOUBT[0]))
        self._prompts.doubt([share * doubted_s for share in _PROMPT_DOUBT_AFTER])
        launches_s = [seconds for work, seconds in measured if work.is_mixed]
        if launches_s and token_s:
            self._launch_s = min(launches_s)
            self._most_launch_s = _MOST_LAUNCHES * self._launch_s
            most = _MOST_NEEDED * limits.max_num_batched_tokens
            self._many_tokens = min(most, _MANY * self._launch_s / token_s)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Take what a step took."""
        if seconds <= 0:
            return
        self.stream_seconds += work.num_streams * seconds
        of_streams = (1.0, work.num_streams, self._shares.context * work.context_tokens)
        attended = _BEST_ATTENTION * self._shares.attended * work.attended_tokens
        of_prompts = (work.prompt_tokens + attended, attended)
        if not work.prompt_tokens:
            self._streams.observe(of_streams, seconds)
            return
        if self._streams.predict(of_streams) > (1 + NOISE) * seconds:
            # It took less than it would without its prompts. An engine that computes nothing else
            # would never find out: the warm-up was slow, as of a machine that did other things.
            self._streams.observe(of_streams, seconds)
        streams_s = self._streams.predict(of_streams)
        computed_s = streams_s + self._prompts.predict(of_prompts)
        if work.prompt_tokens < self._many_tokens and work.num_tokens > self._graph_tokens:
            if work.num_streams:
                self._observe_launches(computed_s, seconds)
            if computed_s <= (1 + NOISE) * max(seconds, self._launch_s):
                return
        prompts_s = seconds - streams_s
        # Beside streams a short chunk is lost in noise. Alone, prompts that seem to cost nothing
        # cost little: as nothing, the costs would not be known.
        if prompts_s > _LEAST_SHARE * seconds or not work.num_streams:
            self._prompts.observe(of_prompts, max(prompts_s, _LITTLE * seconds))

    def _observe_launches(self, computed_s: float, seconds: float) -> None:
        """Learn the time of launches. ``computed_s``: what streams and tokens should take. Chunks
        fill the time of launches, so that a step is as likely to take a little less as more.
        """
        late_s = seconds - self._launch_s
        if late_s < 0:
            self._launch_s += _FASTER_SHARE * late_s
        elif computed_s < _LAUNCHED * seconds:
            usual_s = MAX_SURPRISE * NOISE * self._launch_s
            slower_s = self._launch_s + _SLOWER_SHARE * min(late_s, usual_s)
            self._launch_s = min(slower_s, self._most_launch_s)

    @property
    def costs(self) -> EngineCosts:
        """Return the costs as they are known now."""
        limits = self._limits
        step_s, stream_s, contexts_s = self._streams.coefficients
        prompt_s, slower_s = self._prompts.coefficients
        return EngineCosts(
            StepCosts(
                step_s,
                stream_s,
                self._shares.context * contexts_s,
                prompt_s,
                _BEST_ATTENTION * self._shares.attended * (prompt_s + slower_s),
                self._launch_s,
                self._graph_tokens,
            ),
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            limits.block_size,
            limits.num_kv_tokens,
            limits.kv_bytes_per_token,
            limits.max_itl_s,
            limits.max_slowdown,
        )


def limits_of(
    spec: EngineSpec, layout: KVCacheLayout, num_blocks: int, graph_tokens: int
) -> EngineCosts:
    """Return the limits of an engine, of which no cost is known."""
    num_groups = len(layout.groups)
    max_itl_ms = spec.routing.max_itl_ms
    return EngineCosts(
        StepCosts(0.0, 0.0, 0.0, 0.0, 0.0, graph_tokens=graph_tokens),
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        block_size=spec.block_size,
        num_kv_tokens=num_blocks // num_groups * spec.block_size,
        kv_bytes_per_token=layout.block_bytes
        * num_groups
        * spec.tensor_parallel_size
        // spec.block_size,
        max_itl_s=None if max_itl_ms is None else max_itl_ms / 1000,
        # An engine of both roles serves nobody's prompts but its own streams', which a short chunk
        # would keep waiting.
        max_slowdown=None if spec.role == "both" else MAX_SLOWDOWN,
    )
