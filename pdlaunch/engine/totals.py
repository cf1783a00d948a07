"""Totals of an engine since its start."""

from __future__ import annotations

from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import EngineStats
from pdlaunch.protocol.transfer import PullFinished


class Totals:
    """Counts in ``counts``; ``RequestLifecycle.stats`` adds what is there now."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = EngineStats(num_blocks=num_blocks)

    def add_prompt(self, request: Request) -> None:
        """Count where the tokens of a prompt come from."""
        cached, counts = request.cached_tokens, self.counts
        counts.prompt_tokens += request.num_prompt_tokens
        counts.cached_prompt_tokens += sum(cached)
        counts.remote_hit_tokens += cached.remote
        counts.host_hit_tokens += cached.host
        counts.device_hit_tokens += cached.device

    def add_pull(self, event: PullFinished) -> None:
        """Count a pull that has ended and had blocks to bring."""
        counts = self.counts
        if event.ok:
            counts.transfers += 1
            counts.transfer_bytes += event.num_bytes
            counts.transfer_seconds += event.seconds
        else:
            counts.transfer_failures += 1
            counts.late_reads += event.late
        counts.verification_failures += event.verification_failed
        counts.pull_retries += event.num_retries
