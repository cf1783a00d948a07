"""``pdlaunch serve``: check, plan, start, serve until told to stop."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.joining import (
    Agents,
    is_agent_task,
    joined_agents,
    serve_task,
)
from pdlaunch.cli.live import ServeView, reader_of, ready_rows
from pdlaunch.cli.machines import AssumeOption, Judged, judged_machine
from pdlaunch.cli.options import StopOption
from pdlaunch.cli.output import Format, ending_at_errors, say
from pdlaunch.cli.preflight import judge_pairs, load_launch, refuse_errors
from pdlaunch.cli.steady_output import standard_input, steady_output
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.roles import Role
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.plan import plan_processes
from pdlaunch.launch.folders import new_launch_id, new_log_dir
from pdlaunch.launch.launch import LaunchOutcome, check_platform, launch
from pdlaunch.launch.ports import check_engine_ports, listening
from pdlaunch.launch.status import LaunchStatus
from pdlaunch.planning.effective import effective_engines, effective_hosts
from pdlaunch.planning.hosts import planned_hosts
from pdlaunch.planning.models import Model, fetch_weights, read_models
from pdlaunch.planning.resolve import ResolvedLaunch, resolve_on


@with_serve_flags
def serve(
    config: Path | None = None,
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="Print every process that would start, and start none. Refuses a launch that "
        "check-config refuses; does not try ports.",
    ),
    output: Format = typer.Option("table", "--format", help="How --dry-run prints the plan."),
    stop_on_stdin_eof: StopOption = False,
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Start prefill and decode engines behind one router and serve the OpenAI API."""
    # A plan is printed whole, however slowly it is read.
    with contextlib.nullcontext() if dry_run else steady_output(), ending_at_errors():
        if output != "table" and not dry_run:
            raise ConfigError(
                f"--format {output} is how --dry-run prints the plan; add --dry-run or leave "
                "--format out"
            )
        if assume is not None and not dry_run:
            raise ConfigError(
                f"--assume {assume[:80]!a} is another machine, on which nothing can be started",
                fix="add --dry-run, or leave --assume out",
            )
        lifeline = standard_input() if stop_on_stdin_eof else None
        loaded = load_launch(config, flags)
        judged = judged_machine(assume, loaded.config)
        if dry_run:
            resolved = _resolve(loaded, judged, None)[0]
            refuse_errors(resolved, loaded.origins, elsewhere=judged.assumed is not None)
            print_plan(resolved, output)
            return
        check_platform()
        if is_agent_task(loaded.config, os.environ):
            serve_task(loaded.config, os.environ)
            return
        outcome = _launch(loaded, judged, lifeline)
        for line in outcome.report:
            say(line, "red")
        if outcome.survivors:
            say(f"could not be killed: {', '.join(outcome.survivors)}", "red")
        raise typer.Exit(outcome.exit_code)


def _resolve(
    loaded: LoadedConfig, judged: Judged, agents: Agents | None
) -> tuple[ResolvedLaunch, Mapping[Role, Model]]:
    """Return a launch that can be started, and its models. Raises ConfigError."""
    config, joined = loaded.config, None
    if agents is not None:
        # A cluster of Ray may have chosen the address.
        config = config.model_copy(update={"control_address": agents.address})
        joined = agents.joined
    hosts = planned_hosts(config, judged.machine, judged.environ, joined)
    models = read_models(loaded.config, fetch_part)
    resolved = resolve_on(loaded.config, hosts, judged.environ, models)
    resolved.require_startable()
    return resolved, models


def _launch(loaded: LoadedConfig, judged: Judged, lifeline: int | None) -> LaunchOutcome:
    """Wait for agents, judge, start and serve. Raises ConfigError and StartupError."""
    config, launch_id = loaded.config, new_launch_id()
    with contextlib.ExitStack() as stack:
        agents = log_dir = None
        if config.placement != "local":
            log_dir = new_log_dir(config, launch_id)
            agents = stack.enter_context(joined_agents(config, os.environ, log_dir))
        resolved, models = _resolve(loaded, judged, agents)
        refuse_errors(resolved, loaded.origins)
        # Before anything is started, so that a taken port costs no start.
        check_engine_ports(resolved)
        listeners = stack.enter_context(listening(config.host, config.port))
        # After all checks, so that a refused launch downloads nothing.
        fetch_weights(config, models, fetch_part)
        log_dir = log_dir or new_log_dir(config, launch_id)
        summary = partial(_summary, loaded, resolved, log_dir)
        view = stack.enter_context(ServeView(Console(), summary, reader_of(launch_id)))
        outcome = launch(
            resolved,
            view,
            listeners,
            launch_id=launch_id,
            log_dir=log_dir,
            lifeline=lifeline,
            agents=None if agents is None else agents.channel,
            joined=() if agents is None else tuple(agents.joined),
        )
        view.note("stopped")
        return outcome


def _summary(
    loaded: LoadedConfig, resolved: ResolvedLaunch, log_dir: Path, status: LaunchStatus
) -> list[tuple[str, str]]:
    config = resolved.config
    rows = ready_rows(
        status,
        model=resolved.served_model_name,
        connector=config.kv_transfer.connector if resolved.has_pair else None,
        log_dir=str(log_dir),
        needs_key=config.api_key is not None,
    )
    findings = judge_pairs(resolved, loaded.origins, status)
    return rows + [
        (each.severity, f"{each.rule} {each.where}: {each.message}") for each in findings
    ]


def print_plan(resolved: ResolvedLaunch, output: Format) -> None:
    """Print what engines use, and each process with its command and environment; secrets masked."""
    shown = plan_processes(resolved).shown()
    if output == "json":
        document = {
            "engines": effective_engines(resolved),
            "hosts": effective_hosts(resolved),
            **msgspec.to_builtins(shown),
        }
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(document)) + b"\n")
        sys.stdout.flush()
        return
    console = Console(soft_wrap=True, highlight=False)
    for process in shown.processes:
        ports = "".join(f", {name} port {port or 'free'}" for name, port in process.ports.items())
        place = f"on {process.host}, {' '.join(process.devices) or 'no device'}{ports}"
        console.print(Text.assemble((process.name, "bold"), f" {place}"))
        environment = " ".join(
            f"{name}={shlex.quote(value)}" for name, value in process.environment.items()
        )
        console.print(Text(f"  {environment} \\\n  {shlex.join(process.command)}"))
