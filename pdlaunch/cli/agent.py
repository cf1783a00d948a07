"""``pdlaunch agent``: run processes on this host for a supervisor elsewhere."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli import EXIT_FAILED
from pdlaunch.cli.refusal import refuse
from pdlaunch.cli.serve import standard_input
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.hosts.agent import (
    AgentRefusedError,
    AgentSession,
    AgentTimeoutError,
    SessionLostError,
)
from pdlaunch.hosts.agent_messages import Join
from pdlaunch.hosts.join import Ticket, read_ticket
from pdlaunch.hosts.permitted import allowed_executables
from pdlaunch.observe.logs import setup_logging
from pdlaunch.platform.addresses import address_towards
from pdlaunch.platform.machine_file import encode_machine
from pdlaunch.platform.probe import probe_machine
from pdlaunch.process.bootstrap import raise_open_files
from pdlaunch.supervisor.events import SignalInbox
from pdlaunch.supervisor.launch import check_platform

_REJOIN_DELAY_S = 0.2


def agent(
    join: Annotated[
        str,
        typer.Option(
            "--join",
            metavar="FILE",
            help="The join file that `pdlaunch serve --placement hosts` names; - for standard "
            "input.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Which of `hosts` this is; this host's name when left out."),
    ] = None,
    allow_executable: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-executable",
            metavar="COMMAND",
            help="An executable that engines may run, such as vllm; may be given again.",
        ),
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=1, help="How long to wait for an answer."),
    ] = 60.0,
    stop_on_stdin_eof: Annotated[
        bool,
        typer.Option(
            "--stop-on-stdin-eof",
            help="Stop when standard input ends, for programs that must not leave it behind.",
        ),
    ] = False,
) -> None:
    """Start and watch engines on this host for a `pdlaunch serve` on another one."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        check_platform()
        stdin = [standard_input()] if stop_on_stdin_eof else []
        executables = allowed_executables(allow_executable or ())
        ticket = read_ticket(join)
        setup_logging("agent", "info")
        raise_open_files()
        first = _introduction(ticket, name or socket.gethostname())
        with SignalInbox() as signals:
            stops = [signals.fileno(), *stdin]
            reason = _serve(ticket, first, executables, stops, wait_s, errors)
    except ConfigError as error:
        refuse(errors, error)
    except (StartupError, AgentRefusedError, AgentTimeoutError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(EXIT_FAILED) from None
    errors.print(Text(f"left: {reason}"))


def _introduction(ticket: Ticket, name: str) -> Join:
    supervisor = urlsplit(ticket.endpoint).hostname or ""
    address = address_towards(supervisor)
    if address is None:
        raise StartupError(f"there is no route to the supervisor at {supervisor}")
    return Join(
        name=name,
        address=address,
        machine=encode_machine(probe_machine(), os.environ),
        python=sys.executable,
    )


def _serve(
    ticket: Ticket,
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
