"""``pdlaunch serve``: check, plan, start, and serve until a signal; and what it shows meanwhile."""

import contextlib
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Self

import msgspec
import typer
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.text import Text

from pdlaunch.checks.probed import Probes, probe_launch
from pdlaunch.cli.findings import StrictOption
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.joining import Agents, joined_agents, serve_task
from pdlaunch.cli.options import StopOption
from pdlaunch.cli.output import Format, counted, ending_at_errors, print_json, print_line, safe, say
from pdlaunch.cli.preflight import AssumeOption, judged_machine, load_launch, refuse_errors
from pdlaunch.cli.status import pair_line, status_line
from pdlaunch.cli.steady_output import standard_input, steady_output
from pdlaunch.config.hosts import on_host
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.launch.client.api import launch_api, read_status
from pdlaunch.launch.engines import plan_processes
from pdlaunch.launch.hosts.placement.slurm import is_supervisor
from pdlaunch.launch.launch import LaunchOutcome, check_platform, launch, new_log_dir
from pdlaunch.launch.status import LaunchPhase, LaunchStatus, ProcessState, ProcessStatus
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.network import listening
from pdlaunch.planning.models import Model, fetch_weights, read_models
from pdlaunch.planning.plan import planned_hosts
from pdlaunch.planning.resolve import ResolvedLaunch, effective_engines, resolve_on
from pdlaunch.protocol.process.run_dirs import new_launch_id, running_launches
from pdlaunch.protocol.status import DeploymentStatus


@with_serve_flags
def serve(
    config: Path | None = None,
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="Print every process that would start, and start none. Refuses a launch that "
        "check-config refuses; does not check ports.",
    ),
    output: Format = typer.Option("table", "--format", help="How --dry-run prints the plan."),
    stop_on_stdin_eof: StopOption = False,
    strict: StrictOption = False,
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Start prefill and decode engines behind one router and serve the OpenAI API."""
    # A plan is printed completely, even if its reader is slow.
    with contextlib.nullcontext() if dry_run else steady_output(), ending_at_errors():
        if output != "table" and not dry_run:
            why = f"--format {output} is only for the plan of --dry-run"
            raise ConfigError(f"{why}; add --dry-run or remove --format")
        if assume is not None and not dry_run:
            why = f"--assume {assume[:80]!a} is another machine; nothing can be started there"
            raise ConfigError(why, fix="add --dry-run, or remove --assume")
        lifeline = standard_input() if stop_on_stdin_eof else None
        loaded = load_launch(config, flags)
        by_slurm = loaded.config.placement == "slurm"
        if dry_run and by_slurm and os.environ.get("SLURM_PROCID", "0") != "0":
            return  # task 0 prints the plan
        machine, assumed = judged_machine(assume, loaded.config)
        if dry_run:
            resolved, _ = _resolve(loaded, machine, None)
            probes = Probes() if assumed else probe_launch(resolved, with_ports=False)
            refuse_errors(resolved, loaded.origins, probes, strict=strict)
            print_plan(resolved, output)
            return
        check_platform()
        if by_slurm and not is_supervisor(os.environ):
            serve_task(loaded.config, os.environ)
            return
        outcome = _launch(loaded, machine, lifeline, strict=strict)
        for line in outcome.report:
            say(line, "red")
        if outcome.survivors:
            say(f"could not be killed: {', '.join(outcome.survivors)}", "red")
        raise typer.Exit(outcome.exit_code)


def _resolve(
    loaded: LoadedConfig, machine: Machine, agents: Agents | None
) -> tuple[ResolvedLaunch, Mapping[Role, Model]]:
    """Return a launch that can be started, and its models. Raises ConfigError."""
    config, joined = loaded.config, None
    if agents is not None:
        # A cluster of Ray may have chosen the address.
        config = config.model_copy(update={"control_address": agents.address})
        joined = agents.joined
    hosts = planned_hosts(config, machine, os.environ, joined)
    models = read_models(loaded.config, fetch_part)
    resolved = resolve_on(loaded.config, hosts, os.environ, models)
    resolved.require_startable()
    return resolved, models


def _launch(
    loaded: LoadedConfig, machine: Machine, lifeline: int | None, *, strict: bool
) -> LaunchOutcome:
    """Wait for agents, judge, start and serve. Raises ConfigError and StartupError."""
    config, launch_id = loaded.config, new_launch_id()
    with contextlib.ExitStack() as stack:
        agents = log_dir = None
        if config.placement != "local":
            log_dir = new_log_dir(config, launch_id)
            agents = stack.enter_context(joined_agents(config, os.environ, log_dir))
        resolved, models = _resolve(loaded, machine, agents)
        if resolved.engine_reason:
            say(f"engine: {resolved.engine_reason}")
        # Before any process starts, so that a taken port is found early.
        refuse_errors(resolved, loaded.origins, probe_launch(resolved), strict=strict)
        listeners = stack.enter_context(listening(config.host, config.port))
        # After all checks, so that a refused launch downloads no weights.
        fetch_weights(config, models, fetch_part)
        log_dir = log_dir or new_log_dir(config, launch_id)
        summary = partial(
            ready_rows,
            model=resolved.served_model_name,
            connector=config.kv_transfer.connector if resolved.has_pair else None,
            log_dir=str(log_dir),
            needs_key=config.api_key is not None or bool(config.api_keys),
        )
        view = stack.enter_context(ServeView(Console(), summary, reader_of(launch_id)))
        outcome = launch(
            resolved,
            view,
            listeners,
            launch_id=launch_id,
            log_dir=log_dir,
            lifeline=lifeline,
            is_strict=strict,
            agents=None if agents is None else agents.channel,
            joined=() if agents is None else tuple(agents.joined),
        )
        view.note("stopped")
        return outcome


def print_plan(resolved: ResolvedLaunch, output: Format) -> None:
    """Print each process of the plan with its devices, ports, command and masked environment."""
    shown = plan_processes(resolved).shown()
    if output == "json":
        chosen = {"engine": resolved.engine_reason, "engines": effective_engines(resolved)}
        print_json({**chosen, **msgspec.to_builtins(shown)})
        return
    console = Console(soft_wrap=True, highlight=False)
    if resolved.engine_reason:
        console.print(Text(f"engine: {resolved.engine_reason}"))
    for process in shown.processes:
        ports = "".join(f", {name} port {port or 'free'}" for name, port in process.ports.items())
        place = f"on {process.host}, {' '.join(process.devices) or 'no device'}{ports}"
        console.print(Text.assemble((process.name, "bold"), f" {place}"))
        pairs = [f"{name}={shlex.quote(value)}" for name, value in process.environment.items()]
        console.print(Text(f"  {' '.join(pairs)} \\\n  {shlex.join(process.command)}"))


# The terminal output of a launch


# Returns the lines about a ready deployment: label and text
Summary = Callable[[LaunchStatus], list[tuple[str, str]]]
# Reads the status of the launch from its router. Raises PdlaunchError.
Read = Callable[[], DeploymentStatus]

EVERY_S = 10.0
DRAIN_EVERY_S = 2.0
READ_TIMEOUT_S = 5.0
NUM_PAIRS = 4
_READY_POLL_S = 0.02
_PERCENT_EVERY_S = 5.0

_FAILURES = (ProcessState.FAILED, ProcessState.BACKING_OFF, ProcessState.GIVEN_UP)


class ServeView:
    """Shows a launch. During the start, a terminal has one line that is updated; other output has
    a line for each change. Later, each event is a line.

    Lines of the start begin with the seconds since it began, later lines with the time of day.
    """

    def __init__(
        self, console: Console, summary: Summary, read: Read, every_s: float = EVERY_S
    ) -> None:
        self._console = console
        self._summary = summary
        self._read = read
        self._every_s = every_s
        self._start_at = time.monotonic()
        self._status = LaunchStatus(LaunchPhase.STARTING, ())
        # The last line printed for each process, and its time
        self._said: dict[str, tuple[tuple[ProcessState, str], float]] = {}
        self._last_line = ""
        self._num_errors = 0
        self._is_draining = False
        self._is_over = False
        self._wake = threading.Event()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(get_renderable=self._start_line, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_start()
        self._is_over = True
        self._wake.set()

    def changed(self, status: LaunchStatus) -> None:
        self._status = status
        if status.phase is not LaunchPhase.STARTING:
            self._end_start()
        elif self._live is None:
            for process in status.processes:
                if process.state is not ProcessState.PLANNED and self._has_changed(process):
                    self._say(f"{on_host(process.name, process.host)}: {_doing(process)}")
        if status.phase is LaunchPhase.DRAINING and not self._is_draining:
            self._is_draining = True
            self._wake.set()
        elif self._is_draining and status.phase is not LaunchPhase.DRAINING:
            self._is_over = True

    def ready(self, status: LaunchStatus) -> None:
        # In a thread: the router may not know yet, and the supervisor must not wait for it.
        threading.Thread(target=self._watch, args=(status,), daemon=True).start()

    def note(self, text: str) -> None:
        self._print(f"{datetime.now():%H:%M:%S}", text)

    def _end_start(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _start_line(self) -> Text:
        elapsed_s = time.monotonic() - self._start_at
        return render_status(self._status, elapsed_s, self._console.width)

    def _has_changed(self, process: ProcessStatus) -> bool:
        said, now_at = (process.state, process.doing), time.monotonic()
        before, said_at = self._said.get(process.name, (None, 0.0))
        if said == before and (process.fraction is None or now_at - said_at < _PERCENT_EVERY_S):
            return False
        self._said[process.name] = (said, now_at)
        return True

    def _say(self, line: str) -> None:
        self._print(f"{time.monotonic() - self._start_at:6.1f} s", line)

    def _print(self, clock_time: str, line: str) -> None:
        self._console.control(Control.move_to_column(0))  # over the ^C of a terminal
        print_line(f"[{clock_time}] {line}", console=self._console)

    def _watch(self, launch: LaunchStatus) -> None:
        """Print that the launch is ready when its router accepts requests, then its status."""
        while not (self._is_over or self._is_draining):
            # Do not announce a launch that is already stopping.
            if self._takes_requests() and not (self._is_over or self._is_draining):
                self._say("pdlaunch is ready")
                for label, text in self._summary(launch):
                    line = f"  {label:<10} {text}"
                    if label in ("try", "logs"):  # kept whole, to be copied
                        self._console.print(Text(line), soft_wrap=True)
                    else:
                        print_line(line, console=self._console)
                break
            self._wake.wait(_READY_POLL_S)
        while not self._is_over:
            self._wake.wait(DRAIN_EVERY_S if self._is_draining else self._every_s)
            self._wake.clear()
            if not self._is_over:
                self.show_changes()

    def _takes_requests(self) -> bool:
        with contextlib.suppress(PdlaunchError):
            return self._read().state == "ok"
        return False

    def show_changes(self) -> None:
        """Print the status line if it has changed."""
        try:
            status = self._read()
        except PdlaunchError:
            # The router restarts; the supervisor prints that event itself.
            return
        left, line = status.in_flight, status_line(status, self._num_errors)
        if self._is_draining:
            line = f"draining: {counted(left, 'request')} left"
        self._num_errors = status.errors
        # Neither an unused launch nor a drain without requests prints status lines.
        is_unused = self._is_draining or (not self._last_line and status.requests == 0)
        if line != self._last_line and not (self._is_over or (is_unused and left == 0)):
            self.note(line)
        self._last_line = line


def render_status(status: LaunchStatus, elapsed_s: float, columns: int) -> Text:
    """Return one line: how many processes are ready, and what the others do, as far as it fits."""
    done = (ProcessState.READY, ProcessState.EXITED)
    slow = [process for process in status.processes if process.state not in done]
    parts = [f"{status.phase} · {elapsed_s:.0f} s"]
    parts.append(f"{len(status.processes) - len(slow)} of {len(status.processes)} ready")
    if status.num_missing_pairs and not slow:
        parts.append(f"pairs to connect: {status.num_missing_pairs}")
    # Failed processes first, then the others that are not ready.
    slow.sort(key=lambda process: process.state not in _FAILURES)
    parts += [f"{on_host(each.name, each.host)}: {_doing(each)}" for each in slow]
    line = Text(safe(" · ".join(parts)), no_wrap=True)
    line.truncate(columns, overflow="ellipsis")
    return line


def _doing(process: ProcessStatus) -> str:
    percent = "" if process.fraction is None else f" {process.fraction:.0%}"
    return f"{process.state}, {process.doing}{percent}" if process.doing else process.state


def ready_rows(
    status: LaunchStatus, *, model: str, connector: str | None, log_dir: str, needs_key: bool
) -> list[tuple[str, str]]:
    """Return the lines about a ready launch: URL, example request, topology, pairs, logs."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    curl = (
        f"curl {status.url}/v1/completions{key} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model}", "prompt": "Hello"}}\''
    )
    # The slowest pairs first, because they may be a problem.
    pairs = sorted(status.pairs, key=lambda pair: pair.gigabytes_per_s or 0.0)
    lines = [pair_line(pair) for pair in pairs[:NUM_PAIRS]]
    if len(pairs) > NUM_PAIRS:
        lines.append(f"… and {len(pairs) - NUM_PAIRS} more pairs")
    return [
        ("URL", status.url),
        ("try", curl),
        ("topology", _topology(status.processes)),
        *([("connector", connector)] if connector else []),
        *(("pair", line) for line in lines),
        ("logs", log_dir),
        ("stop", "Ctrl-C waits for running requests; a second Ctrl-C does not"),
    ]


def _topology(processes: Sequence[ProcessStatus]) -> str:
    """Write ``1 prefill + 2 decode (tp 2) on 2 hosts``; no ``tp`` for vLLM, whose ranks are not
    processes of the launch.
    """
    names = [each.name.partition("/") for each in processes]
    ranks = Counter(engine for engine, _, rank in names if rank.startswith("rank-"))
    parts = []
    for role in ROLES:
        engines = [each.name for each in processes if each.name.rpartition("-")[0] == role]
        if engines:
            tp = f" (tp {tp_size})" if (tp_size := ranks[engines[0]]) > 1 else ""
            parts.append(f"{len(engines)} {role}{tp}")
    num_hosts = len({process.host for process in processes})
    return " + ".join(parts) + (f" on {num_hosts} hosts" if num_hosts > 1 else "")


def reader_of(launch_id: str) -> Read:
    """Return a function that reads the status of this launch at its admin socket."""

    def read() -> DeploymentStatus:
        for running in running_launches():
            if running.card.launch_id == launch_id:
                return read_status(launch_api(running, READ_TIMEOUT_S))
        raise PdlaunchError("the router is not listening yet")

    return read
