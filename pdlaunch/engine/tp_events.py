"""Merge the transfer events of all ranks of a TP group into one event each.

A block is moved only when every rank has moved its heads.
"""

from __future__ import annotations

from pdlaunch.protocol.ids import LeaseId, PullId
from pdlaunch.protocol.transfer import (
    LeaseEnded,
    PullDrained,
    PullFinished,
    TransferEvent,
    join_paths,
)


class EventAggregator:
    """Counts what each rank has reported; ``add`` returns events that are now true of the whole
    engine.
    """

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._leases: dict[LeaseId, list[LeaseEnded]] = {}
        self._finished: dict[PullId, list[PullFinished]] = {}
        self._num_drained: dict[PullId, int] = {}

    def add(self, event: TransferEvent) -> list[TransferEvent]:
        match event:
            case LeaseEnded():
                events = self._add_lease(event)
            case PullFinished():
                self._finished.setdefault(event.pull_id, []).append(event)
                events = self._pull_events(event.pull_id, newly_finished=True)
            case PullDrained():
                self._num_drained[event.pull_id] = self._num_drained.get(event.pull_id, 0) + 1
                events = self._pull_events(event.pull_id, newly_finished=False)
        return events

    def _add_lease(self, event: LeaseEnded) -> list[TransferEvent]:
        reports = self._leases.setdefault(event.lease_id, [])
        reports.append(event)
        if len(reports) < self._tp_size:
            return []
        del self._leases[event.lease_id]
        # One rank whose lease expired makes the whole lease an expired one.
        reasons = {report.reason for report in reports}
        reason = next(name for name in ("expired", "released", "pulled") if name in reasons)
        return [LeaseEnded(lease_id=event.lease_id, reason=reason)]

    def _pull_events(self, pull_id: PullId, *, newly_finished: bool) -> list[TransferEvent]:
        reports = self._finished.get(pull_id, [])
        if len(reports) < self._tp_size:
            return []
        # Each rank that reports a READ in flight sends a PullDrained, too, perhaps before the last
        # rank reports.
        num_in_flight = sum(report.in_flight for report in reports)
        num_drained = self._num_drained.get(pull_id, 0)
        all_drained = num_drained >= num_in_flight
        events: list[TransferEvent] = []
        if newly_finished:
            # The last rank reports after others have drained: then nothing is in flight any more.
            events.append(_merge(reports, in_flight=not all_drained))
        elif all_drained:
            events.append(PullDrained(pull_id=pull_id))
        if all_drained:
            del self._finished[pull_id]
            self._num_drained.pop(pull_id, None)
        return events


def _merge(reports: list[PullFinished], *, in_flight: bool) -> PullFinished:
    """Return all ranks' reports as one, which is right only if all are."""
    # One rank that has failed makes the engine compute the prompt again: the others' shares of the
    # lease are used up, so that nobody can pull it a second time.
    failed = [report for report in reports if not report.ok]
    return PullFinished(
        pull_id=reports[0].pull_id,
        ok=not failed,
        error="; ".join(sorted({report.error for report in failed})),
        in_flight=in_flight,
        num_bytes=sum(report.num_bytes for report in reports),
        seconds=max(report.seconds for report in reports),
        read_s=max(report.read_s for report in reports),
        prefill=next((report.prefill for report in reports if report.prefill), ""),
        path=join_paths(report.path for report in reports),
        verification_failed=any(report.verification_failed for report in reports),
        late=any(report.late for report in reports),
        num_retries=sum(report.num_retries for report in reports),
        reports={rank: told for report in reports for rank, told in report.reports.items()},
    )
