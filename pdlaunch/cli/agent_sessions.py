"""Serves the sessions of an agent, one after the other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from pdlaunch.errors import StartupError
from pdlaunch.launch.hosts.agent import AgentSession, SessionLostError
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import JoinTicket
from pdlaunch.machine.engine_commands import find_engine_command
from pdlaunch.machine.machine_file import encode_machine
from pdlaunch.machine.network import address_towards
from pdlaunch.machine.probe import probe_machine

_REJOIN_DELAY_S = 0.2


def introduction(
    ticket: JoinTicket, name: str, executables: Mapping[str, str], num_cpus: int | None = None
) -> Join:
    """Return how this host introduces itself. Raises StartupError without a route.

    ``executables``: paths of those that it allows, by name.
    """
    supervisor = urlsplit(ticket.endpoint).hostname or ""
    address = address_towards(supervisor)
    if address is None:
        raise StartupError(f"there is no route to the supervisor at {supervisor}")
    machine = probe_machine()
    if num_cpus is not None:
        machine = replace(machine, cpus=machine.cpus[:num_cpus])
    return Join(
        name=name,
        address=address,
        machine=encode_machine(machine, os.environ),
        python=sys.executable,
        executables={
            name: find_engine_command(path, os.environ) for name, path in executables.items()
        },
    )


def serve_sessions(
    ticket: JoinTicket,
    join: Join,
    executables: dict[str, str],
    stops: list[int],
    wait_s: float,
    errors: Console,
) -> str:
    """Serve one session after the other, until one ends for good; return why."""

    def note(text: str) -> None:
        errors.print(Text(text))

    while True:
        session = AgentSession(ticket, join, executables, stops, first_wait_s=wait_s, note=note)
        try:
            return session.run()
        except SessionLostError as error:
            note(f"the session is over, its processes have ended; joining again: {error}")
            time.sleep(_REJOIN_DELAY_S)
