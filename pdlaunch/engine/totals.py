"""What the scheduler has counted since the start."""

from __future__ import annotations

from pdlaunch.engine.request import Request
from pdlaunch.protocol.engine import EngineStats
from pdlaunch.protocol.transfer import PullFinished


class Totals:
    """``counts`` holds the totals; what is of now is filled in by whoever sends them."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = EngineStats(num_blocks=num_blocks)

    def add_prompt(self, request: Request, num_cached: int) -> None:
        """A request begins with ``num_cached`` tokens of its prompt: where did they come from?"""
        num_remote = min(request.num_remote_tokens, num_cached)
        num_host = min(request.num_host_tokens, num_cached - num_remote)
        counts = self.counts
        counts.prompt_tokens += request.num_prompt_tokens
        counts.cached_prompt_tokens += num_cached
        counts.remote_hit_tokens += num_remote
        counts.host_hit_tokens += num_host
        counts.device_hit_tokens += num_cached - num_remote - num_host

    def add_pull(self, event: PullFinished) -> None:
        """A pull that had blocks to bring has ended."""
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
