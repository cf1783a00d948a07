"""Names the states of a process and the phases of a launch, with the transitions that exist."""

from __future__ import annotations

from enum import StrEnum


class ProcessState(StrEnum):
    """Says where one process is in its life."""

    PLANNED = "planned"
    CONVERTING = "converting"
    """A conversion is running; servers, ranks and router are never in this state."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It takes no new work and finishes what runs."""
    EXITED = "exited"
    """It ended because it was asked to, perhaps to be started anew, or is a conversion that is
    done.
    """
    FAILED = "failed"
    """It ended by itself, or was killed by somebody else."""
    BACKING_OFF = "backing-off"
    """It waits to be started under the next incarnation."""
    GIVEN_UP = "given-up"
    """Its engine died too often: it is left alone for a while."""


TRANSITIONS: dict[ProcessState, frozenset[ProcessState]] = {
    ProcessState.PLANNED: frozenset(
        {ProcessState.CONVERTING, ProcessState.STARTING, ProcessState.EXITED}
    ),
    ProcessState.CONVERTING: frozenset({ProcessState.EXITED, ProcessState.FAILED}),
    ProcessState.STARTING: frozenset(
        {ProcessState.READY, ProcessState.EXITED, ProcessState.FAILED}
    ),
    ProcessState.READY: frozenset(
        {ProcessState.DRAINING, ProcessState.EXITED, ProcessState.FAILED}
    ),
    ProcessState.DRAINING: frozenset({ProcessState.EXITED, ProcessState.FAILED}),
    ProcessState.FAILED: frozenset(
        {ProcessState.BACKING_OFF, ProcessState.GIVEN_UP, ProcessState.STARTING}
    ),
    ProcessState.BACKING_OFF: frozenset(
        {ProcessState.STARTING, ProcessState.EXITED, ProcessState.GIVEN_UP}
    ),
    ProcessState.GIVEN_UP: frozenset({ProcessState.STARTING}),
    ProcessState.EXITED: frozenset({ProcessState.STARTING}),
}

ALIVE = frozenset(
    {ProcessState.CONVERTING, ProcessState.STARTING, ProcessState.READY, ProcessState.DRAINING}
)
"""States in which there is an operating system process."""


class LaunchPhase(StrEnum):
    """Says where the launch is; it only moves down this list, and may skip."""

    PREPARING = "preparing"
    """Models are converted."""
    STARTING = "starting"
    READY = "ready"
    DRAINING_ROUTER = "draining the router"
    DRAINING_ENGINES = "draining the engines"
    STOPPING_ROUTER = "stopping the router"
    """The router ends the requests that still run, while their engines are still there."""
    STOPPING = "stopping"
    """Ready processes get Stop, the others SIGTERM."""
    TERMINATING = "terminating"
    """Processes that are left get SIGTERM."""
    KILLING = "killing"
    """Processes that are left get SIGKILL."""
    STOPPED = "stopped"
