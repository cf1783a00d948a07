"""Totals of one rank's transfers since it started, under the names of ``EngineStats``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished, TransferEvent


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Immutable, so that other threads may read the latest one."""

    transfer_bytes: int = 0
    transfer_seconds: float = 0.0
    """From StartPull to PullFinished, of pulls that succeeded."""
    transfers: int = 0
    """Pulls that succeeded."""
    transfer_failures: int = 0
    """Pulls that failed, cancelled ones included."""
    leases_expired: int = 0
    verification_failures: int = 0

    def counting(self, events: Iterable[TransferEvent]) -> TransferStats:
        """These totals with ``events`` added."""
        stats = self
        for event in events:
            stats = stats._with(event)
        return stats

    def _with(self, event: TransferEvent) -> TransferStats:
        match event:
            case PullFinished(ok=True):
                return replace(
                    self,
                    transfer_bytes=self.transfer_bytes + event.num_bytes,
                    transfer_seconds=self.transfer_seconds + event.seconds,
                    transfers=self.transfers + 1,
                )
            case PullFinished():
                return replace(
                    self,
                    transfer_failures=self.transfer_failures + 1,
                    verification_failures=self.verification_failures + event.verification_failed,
                )
            case LeaseEnded(reason="expired"):
                return replace(self, leases_expired=self.leases_expired + 1)
            case LeaseEnded() | PullDrained():
                return self
