"""What a rank leaves to the peers that map its memory: its ledger, and the proof of its death."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from pdlaunch.transfer.ledger import Ledger, new_ledger

logger = logging.getLogger(__name__)

LEDGER_FILE = "ledger"
PROCESS_FILE = "process"
"""A pidfd of the rank."""


@dataclass(frozen=True, slots=True)
class Will:
    """Made while the rank lives."""

    ledger: Ledger
    files: Mapping[str, int]
    """Descriptors by name, to be handed to peers; this owns them."""

    def close(self) -> None:
        """Peers keep descriptors of their own."""
        for fd in self.files.values():
            os.close(fd)


def new_will() -> Will | None:
    """None where the kernel has no such files (before Linux 5.3): then the leases die with this
    rank.
    """
    try:
        process_fd = os.pidfd_open(os.getpid())
    except OSError as error:
        logger.warning("leases of this rank cannot outlive it: pidfd_open: %s", error)
        return None
    ledger, ledger_fd = new_ledger()
    return Will(ledger, {LEDGER_FILE: ledger_fd, PROCESS_FILE: process_fd})
