"""Runs processes on this host for a supervisor elsewhere.

::

    Join ──▶ AgentWelcome ── Spawn, Signal, Send / Exited, Said, Printed, Beat ──▶ the end
      ▲                                                                        │
      └────── the session was lost, and the supervisor is there ◀──────────────┘

Whatever ends a session ends its processes: a word of the supervisor, the end of the lease, a lost
message, a signal. They are children of the agent, so its own death ends them too.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import msgspec
import zmq

from pdlaunch.errors import ConfigError, PdlaunchError, ProtocolError
from pdlaunch.launch.hosts.agent_channel import AgentLease, boot_clock
from pdlaunch.launch.hosts.agent_messages import (
    AgentRefused,
    AgentWelcome,
    AskLastStep,
    Beat,
    Exited,
    FromAgent,
    Join,
    LastStepOf,
    Leave,
    Look,
    Printed,
    Said,
    Seen,
    Send,
    Session,
    Signal,
    Spawn,
    ToAgent,
    from_agent,
    to_agent,
)
from pdlaunch.launch.hosts.join import JoinTicket
from pdlaunch.launch.hosts.local import Children, LocalHost
from pdlaunch.machine.availability import probe_port
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import from_supervisor, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.run_dirs import new_run_dir
from pdlaunch.protocol.sockets import SecureContext

ROOMS = frozenset(("pdlaunch.engine", "pdlaunch.engine.server", "pdlaunch.launch.sidecar"))
_KINDS = frozenset(("rank", "server"))
_HARMLESS = frozenset(("PYTHONUNBUFFERED", "PYTHONHASHSEED", "PYTHONFAULTHANDLER"))
_CHOOSE_CODE = (
    *("LD_", "PYTHON", "GCONV_PATH", "BASH_ENV", "ENV", "PATH", "NODE_OPTIONS"),
    # Libraries that CUDA, NIXL, UCX, NCCL, OpenMP and OpenSSL load by such a name.
    *("CUDA_INJECTION", "NIXL_PLUGIN_DIR", "UCX_MODULE_DIR", "OMP_TOOL_LIBRARIES", "OPENSSL_"),
    *("NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_PROFILER_PLUGIN"),
)
"""Variables by which other programs or libraries than the agent's own would run, and beginnings of
such names.
"""


class NotPermittedError(ConfigError):
    """Is raised for a process that the agent does not start."""


def allowed_executables(names: Sequence[str]) -> dict[str, str]:
    """Return the path of each executable by its name. Raises ConfigError."""
    found = {}
    for name in names:
        path = shutil.which(name)
        if path is None:
            raise ConfigError(
                f"there is no executable {name[:200]}",
                field="--allow-executable",
                value=name,
                fix="name one that is on PATH, or its whole path",
            )
        found[PurePath(name).name] = str(Path(path).absolute())
    return found


def permitted(spec: ProcessSpec, executables: Mapping[str, str]) -> ProcessSpec:
    """Return a process as this host starts it. Raises NotPermittedError.

    Python is the agent's own, and so are the paths of executables. ``executables``: by name.
    """
    for name in spec.environment:
        if name.startswith(_CHOOSE_CODE) and name not in _HARMLESS:
            raise NotPermittedError(
                f"the variable {name} decides which code runs, and an agent decides that for its "
                "host: set it where the agent is started, and leave it out of env"
            )
    command = list(spec.command)
    room = command[3] if command[1:3] == ["-P", "-m"] and len(command) > 3 else ""
    if spec.kind not in _KINDS or room not in ROOMS:
        raise NotPermittedError(f"an agent starts no {spec.kind} with {' '.join(command[:4])}")
    command[0] = sys.executable
    if room == "pdlaunch.launch.sidecar":
        place = command.index("--") + 1 if "--" in command else len(command)
        name = PurePath(command[place]).name if place < len(command) else ""
        if name not in executables:
            raise NotPermittedError(
                f"this host does not allow the executable {name or 'of an engine'}: start its "
                f"agent with --allow-executable {name}"
            )
        command[place] = executables[name]
    return msgspec.structs.replace(spec, command=tuple(command))


logger = logging.getLogger(__name__)

LOOK_S = 0.25  # seconds between two looks at the logs
_PART_BYTES = 64 * 1024  # size of the parts in which logs are read
_MOST_PARTS = 16  # parts of one log at one look: what prints more must not keep heartbeats waiting


class AgentRefusedError(PdlaunchError):
    """Is raised when the supervisor does not let this agent in; the user must act."""


class SessionLostError(PdlaunchError):
    """Is raised when a session is over that a new one may follow."""


class AgentTimeoutError(PdlaunchError):
    """Is raised when the supervisor was silent for too long."""


class AgentSession:
    """Serves one session, from Join to its end. ``stops``: one is readable when it shall end."""

    def __init__(
        self,
        ticket: JoinTicket,
        join: Join,
        executables: Mapping[str, str],
        stops: Sequence[int],
        *,
        first_wait_s: float,
        note: Callable[[str], None],
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        """``first_wait_s``: how long to wait for the answer to Join."""
        self._ticket = ticket
        self._join = join
        self._executables = executables
        self._stops = stops
        self._timeout_s = first_wait_s
        self._beat_s = first_wait_s
        self._note = note
        self._clock = clock
        self._session = Session()
        self._logs = _LogTails()
        self._names: dict[str, str] = {}
        """The engine of each process that was started; empty of all but ranks."""

    def run(self) -> str:
        """Serve until told to leave; return why.

        Raises AgentRefusedError, SessionLostError and AgentTimeoutError. No process of the session
        is left when this returns or raises.
        """
        context = SecureContext(self._ticket.keys, peer=self._ticket.server_public)
        with contextlib.closing(context):
            self._socket = context.connect(
                zmq.DEALER, self._ticket.endpoint, identity=secrets.token_bytes(16)
            )
            asked_at = self._clock()
            self._send(self._join)
            welcome = self._await_welcome()
            if welcome is None:
                return self._leave()
            self._lease = AgentLease(asked_at, welcome.timeout_s)
            self._beat_s = welcome.beat_s
            self._note(f"joined as {self._join.name}")
            with new_run_dir() as self._run_dir:
                return self._serve()

    def _await_welcome(self) -> AgentWelcome | None:
        """Return the answer to Join; None: this agent shall end."""
        poller = self._poller()
        ends_at = self._clock() + self._timeout_s
        while self._clock() < ends_at:
            readable = dict(poller.poll(max(1, int((ends_at - self._clock()) * 1000))))
            if readable.keys() & set(self._stops):
                return None
            for message in self._received():
                match message:
                    case AgentWelcome():
                        return message
                    case AgentRefused(reason=reason):
                        raise AgentRefusedError(reason)
                    case _:
                        pass
        raise AgentTimeoutError(
            f"no supervisor at {self._ticket.endpoint} answered within {self._timeout_s:.0f} s: it "
            "is gone, out of reach, or the join file is of another launch"
        )

    def _serve(self) -> str:
        """Obey. The control channel of the processes is a socket of this host, with the launch's
        keys, which come with the first process.
        """
        log_dir = self._run_dir / "logs"
        with contextlib.ExitStack() as stack:
            children = stack.enter_context(contextlib.closing(Children(log_dir)))
            host: LocalHost | None = None
            poller = self._poller()
            beat_at = look_at = self._clock()
            while True:
                now = self._clock()
                next_at = min(beat_at, look_at) if host is not None else beat_at
                if host is not None and host.poll_s == 0:
                    next_at = now
                readable = dict(poller.poll(max(0, int((next_at - now) * 1000) + 1)))
                now = self._clock()
                if readable.keys() & set(self._stops):
                    # Before it says so: they may then be started elsewhere at once.
                    children.close()
                    return self._leave()
                messages = list(self._received())
                # Before silence is judged: it may be this loop that stood still, with the beats
                # waiting in its socket.
                for message in messages:
                    if isinstance(message, Beat):
                        self._lease.renew(message.stamp)
                if (silent_s := self._lease.silent_s(now)) is not None:
                    raise AgentTimeoutError(
                        f"the supervisor was silent for {silent_s:.0f} s: its processes here were "
                        "ended"
                    )
                for message in messages:
                    if isinstance(message, Spawn) and host is None:
                        host = stack.enter_context(self._local_host(message.bootstrap, children))
                        for source in host.sources:
                            poller.register(source, zmq.POLLIN)
                    if isinstance(message, Leave):
                        return message.reason
                    if isinstance(message, AgentRefused):
                        raise SessionLostError(message.reason)
                    self._obey(message, host)
                if host is not None:
                    self._report(host)
                    if now >= look_at:
                        look_at = now + LOOK_S
                        self._send_logs(host)
                if now >= beat_at:
                    beat_at = now + self._beat_s
                    self._send(Beat(stamp=now))

    def _leave(self) -> str:
        self._send(Leave(reason="its agent was told to end"))
        return "told to end"

    def _obey(self, message: ToAgent, host: LocalHost | None) -> None:
        match message:
            case Look():
                self._send(_look(message))
            case Spawn() if host is not None:
                self._spawn(message, host)
            case AskLastStep(engine=engine) if host is not None:
                self._send(LastStepOf(engine=engine, last_step=host.last_step(engine)))
            case Signal(name=name, number=number) if host is not None:
                host.signal(name, number)
            case Send(name=name, frame=frame) if host is not None:
                host.send(name, from_supervisor.decode(frame))
            case _:
                pass

    def _spawn(self, message: Spawn, host: LocalHost) -> None:
        spec, bootstrap = message.spec, message.bootstrap
        try:
            spec = permitted(spec, self._executables)
        except NotPermittedError as error:
            self._note(f"{spec.name} is not started: {error}")
            self._send(
                AgentRefused(reason=str(error), name=spec.name, incarnation=message.incarnation)
            )
            return
        self._names[spec.name] = spec.engine if spec.kind == "rank" else ""
        host.spawn(spec, message.incarnation, self._here(bootstrap))

    def _here(self, bootstrap: Bootstrap) -> Bootstrap:
        """Return what a process is given, with the folder and the control channel of this host."""
        rendezvous = bootstrap.rendezvous
        if rendezvous.startswith("file://"):
            rendezvous = f"file://{self._run_dir / Path(rendezvous).name}"
        return msgspec.structs.replace(
            bootstrap,
            control=self._control,
            run_dir=str(self._run_dir),
            rendezvous=rendezvous,
        )

    @contextlib.contextmanager
    def _local_host(self, bootstrap: Bootstrap, children: Children) -> Iterator[LocalHost]:
        with (
            contextlib.closing(SecureContext(bootstrap.keys)) as context,
            contextlib.closing(EnginePorts()) as engine_ports,
        ):
            control, self._control = context.listen(zmq.ROUTER, f"ipc://{self._run_dir}/control")
            yield LocalHost(control, children, engine_ports)

    def _report(self, host: LocalHost) -> None:
        """Tell of ends and pass messages on; what a process said before its end comes first."""
        # Ends are looked for before messages are, and told after them: whatever a process said
        # before its end has arrived by then.
        exits = host.exits()
        for message in host.messages():
            self._send(Said(name=message.name, frame=to_supervisor.encode(message.message)))
        for gone in exits:
            self._send_log(host, gone.name, to_the_end=True)
            engine = self._names.get(gone.name, "")
            exited = Exited(
                name=gone.name, incarnation=gone.incarnation, returncode=gone.returncode
            )
            if engine:
                # Whichever rank dies first: rank 0 has written what all of them computed.
                exited.last_step = host.last_step(engine)
            self._send(exited)

    def _send_logs(self, host: LocalHost) -> None:
        for name in self._names:
            self._send_log(host, name)

    def _send_log(self, host: LocalHost, name: str, *, to_the_end: bool = False) -> None:
        for data in self._logs.new(name, host.log_path(name), to_the_end=to_the_end):
            self._send(Printed(name=name, data=data))

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for stop in self._stops:
            poller.register(stop, zmq.POLLIN)
        return poller

    def _send(self, message: FromAgent) -> None:
        # ZMQ gives up a connection at whose other end another program answers; to wait for it here
        # would keep the lease from ending, and Ctrl-C.
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(
                self._session.frames(from_agent.encode(message)), zmq.NOBLOCK
            )

    def _received(self) -> Iterator[ToAgent]:
        """Yield the messages that have arrived. Raises SessionLostError when one is missing."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield self._read(frames)
            except ProtocolError as error:
                raise SessionLostError(str(error)) from None

    def _read(self, frames: list[bytes]) -> ToAgent:
        """Return a message. Refusals stand outside of the session, and have any version."""
        with contextlib.suppress(ProtocolError):
            refused = to_agent.decode(frames[-1])
            if isinstance(refused, AgentRefused):
                return refused
        return to_agent.decode(self._session.payload(frames))


class _LogTails:
    """Reads what processes have printed since the last look, from their log files, by name."""

    def __init__(self) -> None:
        self._read_bytes: dict[str, int] = {}

    def new(self, name: str, path: Path, *, to_the_end: bool = False) -> Iterator[bytes]:
        """Yield what the file has beyond what was read before, in parts."""
        try:
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(name, 0))
                num_parts = 0
                while (to_the_end or num_parts < _MOST_PARTS) and (part := file.read(_PART_BYTES)):
                    num_parts += 1
                    self._read_bytes[name] = self._read_bytes.get(name, 0) + len(part)
                    yield part
        except OSError:
            return  # Not there yet, or removed: a launch goes on without logs.


def _look(asked: Look) -> Seen:
    states = {port: probe_port(asked.address, port) for port in asked.ports}
    return Seen(
        missing_paths=[each for each in asked.paths if not Path(each).exists()],
        busy_ports={
            port: state.detail or state.problem
            for port, state in states.items()
            if state is not None and state.problem
        },
    )
