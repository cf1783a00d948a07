"""Finds prompts that a decode engine has computed though it was handed their KV blocks.

For engines whose answers do not tell (vLLM without --enable-prompt-tokens-details). They count
where the tokens of prompts came from, and each look at these counts is compared with what the
router has handed over::

    look ──── handed over ──── first token ──── look      tokens handed over
      └ read or found cached ────────────────────┘ more   - growth of these = tokens computed

Other requests add to the growth alone, so that what is left over was computed for certain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pdlaunch.http.watch.canary import NUM_BACKED_OFF_TOKENS
from pdlaunch.http.watch.engine_api import Counts

_SOURCES = "vllm:prompt_tokens_by_source_total"
_SPARED = ("external_kv_transfer", "local_cache_hit")
NUM_LOOKS = 30
"""The looks that are remembered, and what was handed over since."""


def tells_sources(counts: Counts) -> bool:
    """Return whether an engine counts where the tokens of prompts came from."""
    return counts.has(_SOURCES)


@dataclass(frozen=True, slots=True)
class HandedPrompt:
    """Describes a prompt whose KV blocks an engine was handed."""

    prefill: str
    num_tokens: int
    look: int
    """The last look before it was handed over."""


class Recomputed(NamedTuple):
    """Tells what an engine has computed itself."""

    num_tokens: int
    prefills: Sequence[str]
    """Prefill engines whose blocks it may have been handed in vain: the counts do not tell."""


class HandedPrompts:
    """Keeps what one engine was handed; only what is handed over after a ``judge`` is kept."""

    def __init__(self) -> None:
        self._num_looks = 0
        self._spared: dict[int, float] = {}
        """Tokens that the engine had read or found by each of the last looks."""
        self._answered: list[HandedPrompt] = []
        """Prompts that it has begun to answer since the last look."""
        self._judged: list[HandedPrompt] = []

    def hand(self, prefill: str, num_tokens: int) -> HandedPrompt | None:
        """Note a prompt that the engine is about to be handed; None while nobody looks."""
        return HandedPrompt(prefill, num_tokens, self._num_looks) if self._num_looks else None

    def answered(self, prompt: HandedPrompt) -> None:
        """Note that the first token has come: its tokens are counted."""
        self._answered.append(prompt)

    def take_answered(self) -> Sequence[HandedPrompt]:
        """Return the prompts to be judged by the counts that are read next."""
        answered, self._answered = self._answered, []
        return answered

    def judge(self, answered: Sequence[HandedPrompt], counts: Counts) -> Recomputed | None:
        """Compare prompts with counts that were read after they were taken; None: all is well."""
        num_spared = sum(counts.total(_SOURCES, source=source) for source in _SPARED)
        self._judged += answered
        num_computed = self._num_computed(num_spared) if answered else 0
        if num_computed:
            self._judged, self._spared = [], {}
        self._num_looks += 1
        self._spared[self._num_looks] = num_spared
        self._spared.pop(self._num_looks - NUM_LOOKS, None)
        self._judged = [each for each in self._judged if each.look in self._spared]
        if not num_computed:
            return None
        return Recomputed(num_computed, sorted({each.prefill for each in answered}))

    def _num_computed(self, num_spared: float) -> int:
        """Return how many tokens of the prompts were computed for certain.

        Each span of looks tells of what was handed over and answered within it. Prompts that were
        under way when it began hide as many tokens: the span that tells most counts.
        """
        num_handed: dict[int, int] = defaultdict(int)
        for each in self._judged:
            num_handed[each.look] += max(0, each.num_tokens - NUM_BACKED_OFF_TOKENS)
        most, total = 0.0, 0
        for look, then in sorted(self._spared.items(), reverse=True):
            total += num_handed[look]
            most = max(most, total - (num_spared - then))
        return int(most)
