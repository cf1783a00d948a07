"""``pdlaunch agent``: run processes on this host for a supervisor elsewhere."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from urllib.parse import urlsplit

import typer

from pdlaunch.cli.options import StopOption
from pdlaunch.cli.output import ending_at_errors, say
from pdlaunch.cli.steady_output import standard_input, steady_output
from pdlaunch.errors import StartupError
from pdlaunch.launch.events import SignalInbox
from pdlaunch.launch.hosts.agent import AgentSession, SessionLostError, allowed_executables
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import JoinTicket, read_ticket, sole_agent
from pdlaunch.launch.launch import check_platform
from pdlaunch.machine.engine_commands import find_engine_command
from pdlaunch.machine.machine_file import encode_machine
from pdlaunch.machine.network import address_towards
from pdlaunch.machine.probe import probe_machine
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.process.bootstrap import raise_open_files

_REJOIN_DELAY_S = 0.2


def agent(
    join: str = typer.Option(
        ...,
        "--join",
        metavar="FILE",
        help="The join file that `pdlaunch serve --placement hosts` names; - for standard input.",
    ),
    name: str | None = typer.Option(
        None, "--name", help="Which of `hosts` this is; this host's name when left out."
    ),
    allow_executable: list[str] | None = typer.Option(
        None,
        "--allow-executable",
        metavar="COMMAND",
        help="An executable that engines may run, such as vllm; may be given again.",
    ),
    cpus: int | None = typer.Option(
        None, "--cpus", min=1, help="How many cores engines may use here; all when left out."
    ),
    wait_s: float = typer.Option(
        60.0, "--wait", metavar="SECONDS", min=1, help="How long to wait for an answer."
    ),
    stop_on_stdin_eof: StopOption = False,
) -> None:
    """Start and watch engines on this host for a `pdlaunch serve` on another one."""
    with steady_output(), ending_at_errors():
        check_platform()
        stdin = [standard_input()] if stop_on_stdin_eof else []
        executables = allowed_executables(allow_executable or ())
        ticket = read_ticket(join)
        setup_logging("agent", "info")
        raise_open_files()
        own_name = name or socket.gethostname()
        first = introduction(ticket, own_name, executables, cpus)
        with sole_agent(ticket, own_name), SignalInbox() as signals:
            stops = [signals.fileno(), *stdin]
            serve_sessions(ticket, first, executables, stops, wait_s, say)


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
        machine = replace(machine, num_cpus=min(num_cpus, machine.num_cpus))
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
    note: Callable[[str], None],
) -> None:
    """Serve one session after the other, until one ends for good. Raises StartupError."""
    while True:
        session = AgentSession(ticket, join, executables, stops, first_wait_s=wait_s, note=note)
        try:
            note(f"left: {session.run()}")
            return
        except SessionLostError as error:
            note(f"the session is over, its processes have ended; joining again: {error}")
            time.sleep(_REJOIN_DELAY_S)
