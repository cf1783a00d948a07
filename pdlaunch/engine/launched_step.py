"""A step between ``ModelRunner.launch`` and ``ModelRunner.collect``."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdlaunch.engine.device_copies import Download
from pdlaunch.engine.rows import Row
from pdlaunch.engine.sampler import DrawnTokens


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """What has to be done when its tokens are known."""

    step_id: int
    drawn: DrawnTokens | None = None
    """None: it draws nothing here."""
    ended: Download | None = None
    """Of a step that computes and draws nothing here: its blocks are nobody else's before."""
    places: list[tuple[Row, int]] = field(default_factory=list)
    """Where each drawn token stands in its request; rows stay until the step has been collected."""
