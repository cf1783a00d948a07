"""States of a process and of the launch, with the transitions that exist."""

from __future__ import annotations

from enum import StrEnum


class ProcessState(StrEnum):
    """Where one process is in its life."""

    PLANNED = "planned"
    CONVERTING = "converting"
    """A conversion is running; servers, ranks and router are never here."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """Takes no new work, finishes what runs."""
    EXITED = "exited"
    """Ended because it was asked to, perhaps to be started anew; or a conversion that is done."""
    FAILED = "failed"
    """Ended by itself, or killed by a stranger."""
    BACKING_OFF = "backing-off"
    """Waits to be started under the next incarnation."""
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
    """Where the launch is; it only moves down this list, and may skip."""

    PREPARING = "preparing"
    """Models are converted."""
    STARTING = "starting"
    READY = "ready"
    DRAINING_ROUTER = "draining the router"
    DRAINING_ENGINES = "draining the engines"
    STOPPING_ROUTER = "stopping the router"
    """It tells the clients of what still runs, which takes engines that are still there."""
    STOPPING = "stopping"
    """Asked to leave: Stop to what is ready, SIGTERM to the rest."""
    TERMINATING = "terminating"
    """SIGTERM to what is left."""
    KILLING = "killing"
    """SIGKILL to what is left."""
    STOPPED = "stopped"
