"""Runs one launch from its resolved configuration to its exit: plan, spawn, watch, stop."""

import contextlib
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zmq

from pdlaunch.config.model_files.find import cache_root
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines import kind_of, plan_processes, python_command
from pdlaunch.launch.events import EventQueue, SignalInbox
from pdlaunch.launch.hosts.agent_channel import AgentChannel, HostGroup, Lost
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import joined_host
from pdlaunch.launch.hosts.local import LocalHost
from pdlaunch.launch.places import EnginePlaces, findings_of, refuse_errors
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import Observer
from pdlaunch.launch.supervisor import Supervisor, drive
from pdlaunch.observe.logs import setup_logging
from pdlaunch.planning.plan import settled
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.process import run_dirs
from pdlaunch.protocol.process.bootstrap import raise_open_files
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchOutcome:
    report: tuple[str, ...]  # the root cause in at most 20 lines; empty without a failure
    survivors: tuple[str, ...]  # processes that did not end in time after SIGKILL
    exit_code: int  # 0 after serving, 1 after a failure, 128 + signal if stopped before it served


def check_platform(platform: str = sys.platform) -> None:
    """Raise ConfigError if pdlaunch cannot serve on this platform."""
    if platform != "linux":
        raise ConfigError(
            f"serve needs Linux; this is {platform}",
            fix="run it on Linux, in a container or a virtual machine; check-config works here",
        )


def launch(
    resolved: ResolvedLaunch,
    observer: Observer,
    listeners: Sequence[socket.socket],
    *,
    launch_id: str,
    log_dir: Path,
    lifeline: int | None = None,
    is_strict: bool = False,  # refuse slow pairs
    agents: AgentChannel | None = None,
    joined: Sequence[str] = (),
) -> LaunchOutcome:
    """Convert models, start all processes, serve until a stop is requested, stop all processes.

    Call ``check_platform`` and ``resolved.require_startable`` first. ``listeners`` (``listening``)
    are closed once no router will accept connections. ``lifeline``: a descriptor whose end of file
    requests a stop. ``joined``: hosts whose ``agents`` have joined. Raises StartupError and
    ConfigError if a model cannot be converted, or does not fit the settings.
    """
    config, here = resolved.config, resolved.hosts[0].name
    timing = Timing(
        startup_timeout_s=config.startup_timeout_s,
        drain_s=config.drain_timeout_s,
        hang_timeout_s=config.hang_timeout_s,
    )
    log_file = log_dir / SUPERVISOR_LOG
    setup_logging("supervisor", config.log_level, form=config.log_format, file=log_file)
    raise_open_files()
    if resolved.conversions:
        convert_models(resolved, observer)
        resolved = resolved.after_conversion()
        refuse_errors(findings_of(resolved))
    kind = kind_of(resolved)
    keys = new_launch_keys(with_certificate=resolved.spans_hosts)
    with (
        keep_logs(log_dir),
        run_dirs.new_run_dir() as run_dir,
        contextlib.closing(SecureContext(keys)) as context,
        contextlib.closing(EnginePorts()) as engine_ports,
    ):
        control, endpoint = context.listen(zmq.ROUTER, f"ipc://{run_dir / run_dirs.CONTROL_SOCKET}")
        bootstraps = Bootstraps(kind, keys, endpoint, run_dir, launch_id, listeners)
        places = EnginePlaces(resolved, kind, {here, *joined})
        of_host = (control, log_dir, engine_ports)
        host = LocalHost(*of_host)
        if agents is not None:
            on_change = partial(_on_host_change, config, places, observer)
            host = HostGroup(*of_host, name=here, channel=agents, on_change=on_change)
        plan, clock = plan_processes(resolved), time.monotonic
        supervisor = Supervisor(plan, host, bootstraps, places, observer, timing, clock)
        supervisor.wanted.is_strict = is_strict
        with contextlib.closing(host), SignalInbox() as signals:
            drive(supervisor, EventQueue(host, signals, lifeline, run_dir, log_dir).wait, clock)
        seen = supervisor.seen
        report: tuple[str, ...] = ()
        if (failure := seen.failure) is not None:
            log = None if failure.process is None else host.log_path(failure.process)
            report = tuple(failure.report(log))
        for line in report:
            logger.error("%s", line)
        survivors = tuple(process.name for process in seen.processes() if process.alive)
        stop_signal = supervisor.wanted.stop_signal
        code = 0 if seen.was_ready or stop_signal is None else 128 + stop_signal
        return LaunchOutcome(report, survivors, 1 if report or survivors else code)


def convert_models(resolved: ResolvedLaunch, observer: Observer) -> None:
    """Convert models that engines cannot read, in a child process, because this imports heavy
    libraries. Raises StartupError.
    """
    for model in resolved.conversions:
        guard, module = "pdlaunch.protocol.process.bootstrap", "pdlaunch.engine.models.convert"
        said = ""
        with subprocess.Popen(
            python_command(guard, module, model, "--if-needed"),
            # The child ends when this pipe closes, so it does not outlive the supervisor.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in map(str.strip, process.stdout):
                    said = f"{said}\n{line}" if line.startswith("fix: ") else line
                    logger.info("%s", line)
                    # Other lines come from libraries, or are errors.
                    if line.startswith("["):
                        observer.note(f"{model}: {line}")
                process.wait()
            finally:
                # Ctrl-C does not reach the child, which has its own session: kill the child.
                process.kill()
        if process.returncode:
            raise StartupError(f"{model} cannot be converted: {said.removeprefix('error: ')}")


def _on_host_change(
    config: LaunchConfig, places: EnginePlaces, observer: Observer, event: Join | Lost
) -> None:
    match event:
        case Join() as join:
            settings = {host.name: host for host in config.hosts}[join.name]
            places.joined(settled(settings, joined_host(join)))
            text = f"{join.name} has joined again, from {join.address}"
        case Lost(name=name, reason=reason, ended_by=ended_by):
            places.lost(name, ended_by)
            text = f"{name} is lost: {reason}"
    logger.warning("%s", text)
    observer.note(text)


KEPT_LAUNCHES = 20  # log folders in the cache, besides those of older running launches
SUPERVISOR_LOG = "supervisor.log"


def new_log_dir(config: LaunchConfig, launch_id: str) -> Path:
    """Create the log folder, by default a new one in the cache. Raises ConfigError."""
    own = cache_root() / "logs" / launch_id
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else own
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (log_dir / SUPERVISOR_LOG).touch()
    except OSError as error:
        raise ConfigError(
            f"log files cannot be written to {log_dir}: {error.strerror}",
            field="log_dir",
            value=str(log_dir),
            fix="name a folder that you may write to with --log-dir",
        ) from None
    if not config.log_dir:
        prune_logs(log_dir.parent)
    return log_dir.resolve()


@contextlib.contextmanager
def keep_logs(log_dir: Path) -> Iterator[None]:
    """Lock the log folder while the block runs, so that no launch prunes it."""
    with (log_dir / SUPERVISOR_LOG).open("ab") as log:
        # If this fails, another launch with this folder holds the lock, and so keeps the folder.
        with contextlib.suppress(OSError):
            run_dirs.take_lock(log.fileno())
        yield


def prune_logs(folder: Path, num_kept: int = KEPT_LAUNCHES) -> list[Path]:
    """Remove old log folders of launches that have ended; return the removed folders."""
    named = (path for path in folder.iterdir() if run_dirs.LAUNCH_ID.fullmatch(path.name))
    launches = sorted(path for path in named if not path.is_symlink())
    old = []
    for path in launches[:-num_kept]:
        try:
            is_kept = run_dirs.is_locked(path / SUPERVISOR_LOG)
        except FileNotFoundError:  # another launch may remove it just now
            is_kept = False
        if not is_kept:
            shutil.rmtree(path, ignore_errors=True)
            old.append(path)
    return old
