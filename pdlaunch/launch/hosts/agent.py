"""Runs processes on this host for a supervisor on another host.

::

    Join ──▶ AgentWelcome ── Spawn, Signal, Send / ProcessExited, Said, .. ──▶   the end
      ▲                                                                        │
      └────── the session was lost, but the supervisor answers ◀───────────────┘

The end of a session kills its processes, for any reason: the supervisor's Leave, the end of the
lease, a lost message, a signal. Processes are children of the agent and end with it, too.
"""

import contextlib
import logging
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import msgspec
import zmq

from pdlaunch.errors import ConfigError, PdlaunchError, ProtocolError, StartupError
from pdlaunch.launch.hosts import agent_messages as messages
from pdlaunch.launch.hosts.agent_channel import AgentLease, boot_clock
from pdlaunch.launch.hosts.join import JoinTicket
from pdlaunch.launch.hosts.local import LocalHost, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Failed, from_supervisor, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.run_dirs import CONTROL_SOCKET, new_run_dir
from pdlaunch.protocol.sockets import SecureContext

logger = logging.getLogger(__name__)

LOG_POLL_S = 0.25
_PART_BYTES = 64 * 1024  # size of the parts in which logs are read
_REFUSED = 126  # reported as exit code of a process that this host refuses to start
_MOST_PARTS = 16  # parts of one log to send at a time, so that long logs do not delay beats

MODULES = frozenset(("pdlaunch.engine", "pdlaunch.engine.server", "pdlaunch.launch.sidecar"))
_KINDS = frozenset(("rank", "server"))
_HARMLESS = frozenset(("PYTHONUNBUFFERED", "PYTHONHASHSEED", "PYTHONFAULTHANDLER"))
# Variables, or prefixes of their names, that make processes run other programs or load other
# libraries. Second and third line: variables of CUDA, NIXL, UCX, OpenMP, OpenSSL and NCCL.
_CHOOSE_CODE = (
    *("LD_", "PYTHON", "GCONV_PATH", "BASH_ENV", "ENV", "PATH", "NODE_OPTIONS"),
    *("CUDA_INJECTION", "NIXL_PLUGIN_DIR", "UCX_MODULE_DIR", "OMP_TOOL_LIBRARIES", "OPENSSL_"),
    *("NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_PROFILER_PLUGIN"),
)


def allowed_executables(names: Sequence[str]) -> dict[str, str]:
    """Return absolute paths of executables, by name without folder. Raises ConfigError."""
    found = {}
    for name in names:
        path = shutil.which(name)
        if path is None:
            raise ConfigError(
                f"there is no executable {name[:200]}",
                field="--allow-executable",
                value=name,
                fix="name one that is on PATH, or give its absolute path",
            )
        found[PurePath(name).name] = str(Path(path).absolute())
    return found


def permitted(spec: ProcessSpec, executables: Mapping[str, str]) -> ProcessSpec:
    """Return the spec with this host's paths of its programs. Raises ConfigError if the process is
    not allowed here.
    """
    for name in spec.environment:
        if name.startswith(_CHOOSE_CODE) and name not in _HARMLESS:
            raise ConfigError(
                f"the variable {name} decides which code runs, so an agent does not take it from "
                "env: set it where the agent is started, and remove it from env"
            )
    command = list(spec.command)
    module = command[3] if command[1:3] == ["-P", "-m"] and len(command) > 3 else ""
    if spec.kind not in _KINDS or module not in MODULES:
        raise ConfigError(f"an agent does not start a {spec.kind} with {' '.join(command[:4])}")
    command[0] = sys.executable
    if module == "pdlaunch.launch.sidecar":
        place = command.index("--") + 1 if "--" in command else len(command)
        name = PurePath(command[place]).name if place < len(command) else ""
        if name not in executables:
            raise ConfigError(
                f"this host does not allow the executable {name or 'of an engine'}: start its "
                f"agent with --allow-executable {name}"
            )
        command[place] = executables[name]
    return msgspec.structs.replace(spec, command=tuple(command))


class SessionLostError(PdlaunchError):
    """Raised when a session has ended and the agent may start a new one."""


@dataclass(eq=False)
class AgentSession:
    """Serves one session, from Join to its end; a readable descriptor of ``stops`` ends it."""

    ticket: JoinTicket
    join: messages.Join
    executables: Mapping[str, str]
    stops: Sequence[int]
    first_wait_s: float  # how long to wait for the answer to Join
    note: Callable[[str], None]
    clock: Callable[[], float] = boot_clock
    _session: messages.Session = field(default_factory=messages.Session)
    _welcome: messages.AgentWelcome | None = None
    # None until the first process, whose bootstrap has the launch's keys: they secure the control
    # channel between the processes and this agent.
    _host: LocalHost | None = None
    _control: str = ""
    _names: set[str] = field(default_factory=set)  # names of all processes that were started
    _num_sent_bytes: Counter[str] = field(default_factory=Counter)  # by process, of its log

    def run(self) -> str:
        """Serve until the session ends; return why. Raises StartupError if the user must act, and
        SessionLostError. No process of the session is left when this returns or raises.
        """
        context = SecureContext(self.ticket.keys, peer=self.ticket.server_public)
        with (
            contextlib.closing(context),
            new_run_dir() as self._run_dir,
            contextlib.ExitStack() as self._stack,
        ):
            self._socket = context.connect(
                zmq.DEALER, self.ticket.endpoint, identity=secrets.token_bytes(16)
            )
            self._poller = zmq.Poller()
            for source in (self._socket, *self.stops):
                self._poller.register(source, zmq.POLLIN)
            self._asked_at = self._beat_at = self._log_at = self.clock()
            self._lease = AgentLease(self._asked_at, self.first_wait_s)
            self._send(self.join)
            while (reason := self._turn()) is None:
                pass
            return reason

    def _turn(self) -> str | None:
        """Wait for the next events and handle them; return why the session ends, else None."""
        now = self.clock()
        readable = dict(self._poller.poll(max(0, int((self._next_at(now) - now) * 1000) + 1)))
        now = self.clock()
        if readable.keys() & set(self.stops):
            # Kill before sending Leave: the processes may then be started elsewhere at once.
            if self._host is not None:
                self._host.close()
            self._send(messages.Leave(reason="its agent was told to end"))
            return "told to end"
        received = list(self._received())
        # Read messages before checking the lease: if this process was stopped, Beats are waiting.
        for message in received:
            if isinstance(message, messages.AgentWelcome) and self._welcome is None:
                self._welcome = message
                self._lease = AgentLease(self._asked_at, message.timeout_s)
                if self._lease.silent_s(now) is not None:
                    # The answer came after this Join's lease had run out: join again.
                    self._send(messages.Leave(reason="its agent joins again"))
                    raise SessionLostError("the supervisor answered too late")
                self.note(f"joined as {self.join.name}")
            elif isinstance(message, messages.Beat):
                self._lease.renew(message.stamp)
        self._require_lease(now)
        for message in received:
            if isinstance(message, messages.Leave):
                return message.reason
            self._obey(message)
        if self._host is not None:
            if not (self._run_dir / CONTROL_SOCKET).exists():
                self._host.close()
                self._send(
                    messages.Leave(reason=f"{self._run_dir}, the folder of its agent, was removed")
                )
                raise SessionLostError(f"{self._run_dir}, the folder of this agent, was removed")
            self._report(self._host)
            if now >= self._log_at:
                self._log_at = now + LOG_POLL_S
                for name in self._names:
                    self._send_log(self._host, name)
        if self._welcome is not None and now >= self._beat_at:
            self._beat_at = now + self._welcome.beat_s
            self._send(messages.Beat(stamp=now))
        return None

    def _next_at(self, now: float) -> float:
        if self._welcome is None:
            return self._asked_at + self.first_wait_s
        if self._host is None:
            return self._beat_at
        return min(self._beat_at, self._log_at)

    def _require_lease(self, now: float) -> None:
        if (silent_s := self._lease.silent_s(now)) is None:
            return
        if self._welcome is None:
            raise StartupError(
                f"no supervisor at {self.ticket.endpoint} answered within "
                f"{self.first_wait_s:.0f} s: it is gone or out of reach, or the join file belongs "
                "to another launch"
            )
        raise StartupError(
            f"the supervisor was silent for {silent_s:.0f} s: its processes here were ended"
        )

    def _obey(self, message: messages.ToAgent) -> None:
        host = self._host
        match message:
            case messages.AgentRefused(reason=reason) if self._welcome is None:
                raise StartupError(reason)
            case messages.AgentRefused(reason=reason):
                raise SessionLostError(reason)
            case messages.Spawn():
                self._spawn(message)
            case messages.Signal(name=name, number=number) if host is not None:
                host.signal(name, number)
            case messages.Send(name=name, frame=frame) if host is not None:
                host.send(name, from_supervisor.decode(frame))
            case _:
                pass

    def _spawn(self, message: messages.Spawn) -> None:
        try:
            spec = permitted(message.spec, self.executables)
        except ConfigError as error:
            name = message.spec.name
            self.note(f"{name} is not started: {error}")
            failed = Failed(error=f"{self.join.name} does not start it: {error}")
            self._send(messages.Said(name=name, frame=to_supervisor.encode(failed)))
            self._send(ProcessExited(name, message.incarnation, _REFUSED))
            return
        if self._host is None:
            self._host = self._local_host(message.bootstrap)
        self._names.add(spec.name)
        bootstrap = msgspec.structs.replace(
            message.bootstrap,
            control=self._control,
            run_dir=str(self._run_dir),
            rendezvous=f"file://{self._run_dir / Path(message.bootstrap.rendezvous).name}",
        )
        gone = self._host.spawn(spec, message.incarnation, bootstrap)
        if gone is not None:
            self._report_end(self._host, gone)

    def _local_host(self, bootstrap: Bootstrap) -> LocalHost:
        context = self._stack.enter_context(contextlib.closing(SecureContext(bootstrap.keys)))
        engine_ports = self._stack.enter_context(contextlib.closing(EnginePorts()))
        control, self._control = context.listen(
            zmq.ROUTER, f"ipc://{self._run_dir / CONTROL_SOCKET}"
        )
        host = LocalHost(control, self._run_dir / "logs", engine_ports)
        self._stack.callback(host.close)
        for source in host.sources:
            self._poller.register(source, zmq.POLLIN)
        return host

    def _report(self, host: LocalHost) -> None:
        """Forward messages, then report exits, so that a process's messages precede its exit."""
        # Read exits before messages: after its exit, all messages of a process have arrived.
        exits = host.exits()
        for message in host.messages():
            self._send(
                messages.Said(name=message.name, frame=to_supervisor.encode(message.message))
            )
        for gone in exits:
            self._report_end(host, gone)

    def _report_end(self, host: LocalHost, gone: ProcessExited) -> None:
        self._send_log(host, gone.name, to_the_end=True)
        self._send(gone)

    def _send_log(self, host: LocalHost, name: str, *, to_the_end: bool = False) -> None:
        # If the log is absent or removed, the launch continues without it.
        with contextlib.suppress(OSError), host.log_path(name).open("rb") as file:
            file.seek(self._num_sent_bytes[name])
            num_parts = 0
            while (to_the_end or num_parts < _MOST_PARTS) and (part := file.read(_PART_BYTES)):
                num_parts += 1
                self._num_sent_bytes[name] += len(part)
                self._send(messages.Printed(name=name, data=part))

    def _send(self, message: messages.FromAgent) -> None:
        # ZMQ drops the connection if another program listens at the endpoint. Waiting here would
        # delay the end of the lease, and Ctrl-C.
        with contextlib.suppress(zmq.Again):
            frames = self._session.frames(messages.from_agent.encode(message))
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    def _received(self) -> Iterator[messages.ToAgent]:
        """Yield the messages that have arrived. Raises SessionLostError if one is missing."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # Refusals are not numbered in this session, and may come from another version.
            with contextlib.suppress(ProtocolError):
                message = messages.to_agent.decode(frames[-1])
                if isinstance(message, messages.AgentRefused):
                    yield message
                    continue
            try:
                yield messages.to_agent.decode(self._session.payload(frames))
            except ProtocolError as error:
                raise SessionLostError(str(error)) from None
