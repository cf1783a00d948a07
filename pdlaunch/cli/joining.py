"""Finds the hosts of a launch by a scheduler or by agents that join; and ``pdlaunch agent``."""

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import typer

from pdlaunch.cli.options import StopOption
from pdlaunch.cli.output import ending_at_errors, say
from pdlaunch.cli.steady_output import standard_input, steady_output
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.events import SignalInbox
from pdlaunch.launch.hosts import join as join_file
from pdlaunch.launch.hosts.agent import AgentSession, SessionLostError, allowed_executables
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Lost, Reported
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import JoinKeys
from pdlaunch.launch.hosts.placement import ray_cluster, slurm
from pdlaunch.launch.launch import check_platform
from pdlaunch.machine.host import find_engine_command, recorded_environ
from pdlaunch.machine.network import address_towards, default_address
from pdlaunch.machine.probe import probe_machine
from pdlaunch.observe.logs import setup_logging
from pdlaunch.planning.models import choose_engine
from pdlaunch.planning.plan import ResolvedHost
from pdlaunch.protocol.process.bootstrap import leave_ends_to_supervisor, raise_open_files

JOIN_FILE = "join.json"
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Agents:
    """The agents of a launch, which have all joined."""

    channel: AgentChannel
    joined: dict[str, ResolvedHost]

    @property
    def address(self) -> str:
        """Return the address of this host at which the agents have joined."""
        return urlsplit(self.channel.endpoint).hostname or ""


def with_placed_hosts(loaded: LoadedConfig, environ: Mapping[str, str]) -> LoadedConfig:
    """Return a configuration that names the hosts of its launch. Raises ConfigError."""
    config = loaded.config
    match config.placement:
        case "ray":
            # Ray places the engines: the configuration gets one host for each bundle.
            hosts = ray_cluster.ray_hosts(ray_cluster.ray_bundles(config))
            placed = {"hosts": hosts, "placement_strategy": "spread"}
        case "slurm":
            placed = {"hosts": slurm.slurm_hosts(environ)}
        case "local" | "hosts":
            return loaded
    return replace(loaded, config=config.model_copy(update=placed))


def serve_task(config: LaunchConfig, environ: Mapping[str, str]) -> None:
    """Run the agent of this Slurm task until the supervisor's task ends.

    ``scancel`` and the end of the allocation signal every task. Agents ignore the signal: the
    supervisor drains and tells its agents to leave. Raises ConfigError and StartupError.
    """
    path = slurm.slurm_join_file(config, environ)
    ends_at = time.monotonic() + config.join_timeout_s
    while not path.exists():
        if time.monotonic() > ends_at:
            late = f"{path} did not appear within {config.join_timeout_s:g} s (join_timeout_s)"
            fix = "start the step in a folder that all nodes share, or name a shared file with "
            raise StartupError(f"{late}. Task 0 writes it: {fix}--join-file")
        time.sleep(_LOOK_S)
    leave_ends_to_supervisor()
    # The task's own configuration allows executables: the user who started the task wrote it.
    allowed = choose_engine(config, environ).config.engine_executables
    name = environ["SLURMD_NODENAME"]
    _serve_sessions(join_file.read_ticket(str(path)), name, allowed, [], config.join_timeout_s)


@contextlib.contextmanager
def joined_agents(
    config: LaunchConfig, environ: Mapping[str, str], log_dir: Path
) -> Iterator[Agents | None]:
    """Yield the agents of all hosts of a launch; None if it has no other hosts. Raises ConfigError,
    and StartupError naming hosts that do not join in time.
    """
    names = [host.name for host in config.hosts if host.name != LOCAL]
    if config.placement == "local" or not names:
        yield None
        return
    if config.placement == "ray":
        with _agents_of_ray(config, names, log_dir) as agents:
            yield agents
        return
    path = Path(config.join_file).expanduser() if config.join_file else log_dir / JOIN_FILE
    if config.placement == "slurm":
        path = slurm.slurm_join_file(config, environ)
    address = config.control_address or default_address()
    if address is None:
        why = "this host has no address on a default route for agents to join at"
        fix = "set --control-address to the address at which other hosts reach this host"
        raise ConfigError(why, field="control_address", fix=fix)
    with contextlib.ExitStack() as stack:
        keys = stack.enter_context(join_file.held_join_file(path, config.control_port))
        # Written after the channel listens, because the join file contains its port.
        channel = _listen(keys, address, names, config, log_dir)
        stack.callback(channel.close)
        join_file.write_join_files(path, keys, channel.endpoint)
        say(f"waiting for {', '.join(names)} at {channel.endpoint}")
        if config.placement == "hosts":
            command = f"pdlaunch agent --join {path} --name NAME"
            secret = "with a copy of that file, which contains a secret"
            say(f"on each host run\n  {command}\n{secret}")
        advice = f"start `pdlaunch agent --join {path}` there"
        yield _joined(channel, names, config.join_timeout_s, advice)


@contextlib.contextmanager
def _agents_of_ray(config: LaunchConfig, names: Sequence[str], log_dir: Path) -> Iterator[Agents]:
    with ray_cluster.ray_cluster() as ray, contextlib.ExitStack() as stack:
        chosen = choose_engine(config, os.environ).config  # agents allow its executables
        bundles = ray_cluster.ray_bundles(chosen, has_gpus=bool(ray.cluster_resources().get("GPU")))
        say("waiting for Ray to place the engines")
        strategy, timeout_s = config.placement_strategy, config.join_timeout_s
        placed = ray_cluster.placed_actors(ray, bundles, strategy, timeout_s, say)
        actors = stack.enter_context(placed)
        keys = join_file.new_join_keys(config.control_port)
        address = config.control_address or str(ray.util.get_node_ip_address())
        channel = _listen(keys, address, names, config, log_dir)
        # Undone in reverse: first the watch over Ray's actors, then the agents, then their channel.
        stack.callback(channel.close)
        stack.callback(ray_cluster.stop_agents, ray, actors)
        endpoint, public = channel.endpoint, keys.server.public
        stack.enter_context(ray_cluster.kept_agents(ray, actors, endpoint, public, channel.admit))
        yield _joined(channel, names, timeout_s, "look at the logs of its actor in Ray")


def _listen(
    keys: JoinKeys, address: str, names: Sequence[str], config: LaunchConfig, log_dir: Path
) -> AgentChannel:
    def log_of(name: str) -> Path:
        return log_dir / f"{name.replace('/', '.')}.log"

    return AgentChannel(keys, address, names, timeout_s=config.agent_timeout_s, print_to=log_of)


def _joined(channel: AgentChannel, names: Sequence[str], timeout_s: float, advice: str) -> Agents:
    """Wait until all agents have joined. Raises StartupError that names the missing ones."""
    ends_at, joined = time.monotonic() + timeout_s, dict[str, ResolvedHost]()
    while (left_s := ends_at - time.monotonic()) > 0:
        select.select([channel.fileno()], [], [], left_s)
        for event in channel.take():
            match event:
                case Join() as join:
                    joined[join.name] = join_file.joined_host(join)
                    say(f"{join.name} has joined from {join.address}")
                case Lost(name=name, reason=reason):
                    joined.pop(name, None)
                    say(f"{name} has left: {reason}")
                case Reported():
                    pass
        if joined.keys() >= set(names):
            return Agents(channel, joined)
    missing = ", ".join(name for name in names if name not in joined)
    late = f"{missing} did not join within {timeout_s:g} s (join_timeout_s)"
    raise StartupError(f"{late}: {advice}, and check that {channel.endpoint} can be reached")


_REJOIN_DELAY_S = 0.2


def agent(
    join: str = typer.Option(
        ...,
        "--join",
        metavar="FILE",
        help="The join file that `pdlaunch serve --placement hosts` prints; - for standard input.",
    ),
    name: str | None = typer.Option(
        None, "--name", help="Name of this host in `hosts`; by default its host name."
    ),
    allow_executable: list[str] | None = typer.Option(
        None,
        "--allow-executable",
        metavar="COMMAND",
        help="An executable that engines may run, such as vllm; may be repeated.",
    ),
    cpus: int | None = typer.Option(
        None, "--cpus", min=1, help="How many cores engines may use here; by default all."
    ),
    wait_s: float = typer.Option(
        60.0, "--wait", metavar="SECONDS", min=1, help="How long to wait for the supervisor."
    ),
    stop_on_stdin_eof: StopOption = False,
) -> None:
    """Start and watch engines on this host for a `pdlaunch serve` on another host."""
    with steady_output(), ending_at_errors():
        check_platform()
        stdin = [standard_input()] if stop_on_stdin_eof else []
        ticket = join_file.read_ticket(join)
        with SignalInbox() as signals:
            stops = [signals.fileno(), *stdin]
            allowed, own_name = allow_executable or (), name or socket.gethostname()
            _serve_sessions(ticket, own_name, allowed, stops, wait_s, cpus)


def _serve_sessions(
    ticket: join_file.JoinTicket,
    name: str,
    allowed: Sequence[str],
    stops: list[int],
    wait_s: float,
    num_cpus: int | None = None,
) -> None:
    """Run sessions until the supervisor dismisses this agent; after a lost session, join again.
    ``allowed``: executables that engines may run. Raises ConfigError and StartupError.
    """
    executables = allowed_executables(allowed)
    setup_logging("agent", "info")
    raise_open_files()
    supervisor = urlsplit(ticket.endpoint).hostname or ""
    address = address_towards(supervisor)
    if address is None:
        raise StartupError(f"there is no route to the supervisor at {supervisor}")
    machine = probe_machine()
    found = {name: find_engine_command(path, os.environ) for name, path in executables.items()}
    join = Join(
        name=name,
        address=address,
        machine=replace(machine, num_cpus=min(num_cpus or machine.num_cpus, machine.num_cpus)),
        environ=recorded_environ(os.environ),
        executables=found,
    )
    while True:
        session = AgentSession(ticket, join, executables, stops, first_wait_s=wait_s, note=say)
        try:
            say(f"left: {session.run()}")
            return
        except SessionLostError as error:
            say(f"the session was lost, its processes have ended; joining again: {error}")
            time.sleep(_REJOIN_DELAY_S)
