"""Connects a child process to its supervisor: bootstrap, parent guard, control channel, heartbeat.

The bootstrap is one line of JSON on standard input, so that secrets are never in arguments or
environment. Standard input stays open: its end means that the supervisor has ended.

``python -m pdlaunch.protocol.process.bootstrap MODULE ...`` runs any module as a process that ends
with its parent, which holds the pipe of its standard input.
"""

import asyncio
import contextlib
import ctypes
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.shared_settings import AutopilotMode, RoutingPolicy
from pdlaunch.observe.logs import LogFormat
from pdlaunch.protocol.certificates import CertificateFiles
from pdlaunch.protocol.control import Alive, Capabilities, from_supervisor, to_supervisor
from pdlaunch.protocol.engine_link import ConnectorSpec
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext

# Some systems allow a billion, which slows down programs that iterate over all descriptors.
MAX_OPEN_FILES = 65_536
_PR_SET_PDEATHSIG = 1


class ClientKey(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    sha256: str  # hash of the key, in hexadecimal digits
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None
    weight: float = 1.0


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    listeners: tuple[int, ...] = ()  # inherited descriptors of the supervisor's listening sockets
    served_model_name: str
    keys: tuple[ClientKey, ...] = ()  # API keys of clients; empty: clients need no key
    certificate: CertificateFiles | None = None  # None: no TLS
    max_body_bytes: int
    max_queued_requests: int
    max_connections: int
    request_timeout_s: float
    drain_timeout_s: float
    admin_api_key: str | None = None  # None: only the admin socket accepts commands
    allowed_hosts: tuple[str, ...] = ()
    routing: RoutingPolicy = "load"
    autopilot: AutopilotMode = "off"
    model_dir: str = ""  # folder of the tokenizer; empty: the router lets engines tokenize


class DoorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sidecar lets other hosts reach its engine, which listens on a Unix socket."""

    bind_address: str
    advertise_address: str
    port: int  # 0: a free port
    data_ports: str  # ``kv_transfer.data_ports``; vLLM's own side channel uses one of them
    max_model_len: int | None  # None: the engine checks it
    max_body_bytes: int
    max_connections: int


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # ``router``, ``prefill-0``, ``prefill-0/rank-0``
    incarnation: int
    control: str  # ZMQ endpoint of the supervisor
    keys: LaunchKeys
    run_dir: str  # folder of this launch for sockets and rendezvous files; mode 0700
    log_level: str
    log_format: LogFormat = "text"
    engine_json: str | None = None  # ``EngineSpec``, for servers and ranks
    # Key that other routers send to servers, and that our router sends to engines without the token
    engine_api_key: str | None = None
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    router: RouterSpec | None = None
    door: DoorSpec | None = None
    connector: ConnectorSpec | None = None
    tp_rank: int = 0
    rendezvous: str = ""  # ``file://`` URL at which this incarnation's TP group meets
    launch_id: str = ""
    step_record: int = -1  # for rank 0: inherited descriptor of its ``StepRecord``
    port_is_kept: bool = False  # the supervisor holds the port of the previous server for this one
    # Digests of the files that the first process of this kind has read; empty: this is the first
    pinned: dict[str, str] = {}
    heartbeat_s: float = 0.0  # seconds between two Alive messages; 0: send none

    def engine(self) -> EngineSpec:
        assert self.engine_json is not None
        return EngineSpec.model_validate_json(self.engine_json)


def read_bootstrap() -> Bootstrap:
    """Read the first line of standard input, and make this process end with the supervisor."""
    bootstrap = msgspec.json.decode(sys.stdin.buffer.readline(), type=Bootstrap)
    die_with_parent()
    raise_open_files()
    return bootstrap


def raise_open_files() -> None:
    """Raise the soft limit of descriptors to the hard limit: every connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_ends_to_supervisor() -> None:
    """Ignore SIGTERM and SIGINT from now on; ranks call this when they are ready.

    Slurm and systemd signal all processes of a launch at once, but the supervisor still waits for
    requests. It sends Stop, or kills, when they have ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which children would inherit


def die_with_parent() -> None:
    """Make this process end with its parent."""
    # In two ways: the end of standard input also covers a parent that died before prctl.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = sys.stdin.fileno()

    def watch() -> None:
        # Read the descriptor, not sys.stdin: a thread that waits in it holds the lock of its
        # buffer, and the interpreter would abort at exit.
        while os.read(descriptor, 4096):
            pass
        # If this process leads its own group, its children end too.
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-guard", daemon=True).start()


class ControlClient:
    """Sends messages to the supervisor from any thread; calls ``on_message`` in its own thread."""

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        name: str,
        on_message: Callable[[Any], None],
        *,
        encode: Callable[[Any], bytes] = to_supervisor.encode,
        decode: Callable[[bytes], Any] = from_supervisor.decode,
    ) -> None:
        """``encode``, ``decode``: for vLLM's workers, which exchange messages with a sidecar."""
        self._encode, self._decode = encode, decode
        self._context = context
        self._on_message = on_message
        self._inlet, self._outlet = context.pair("control-outbox")
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(endpoint, name), name="control", daemon=True
        )
        self._thread.start()

    def send(self, message: Any) -> None:
        self._queue(self._encode(message))

    def close(self) -> None:
        self._queue(b"")
        self._thread.join(timeout=2)
        with self._lock:
            self._inlet.close()

    def _queue(self, frame: bytes) -> None:
        # A ZMQ socket may be used by one thread at a time. After the context's end, drop messages.
        with self._lock, contextlib.suppress(zmq.ZMQError):
            self._inlet.send(frame, zmq.NOBLOCK)

    def _run(self, endpoint: str, name: str) -> None:
        socket = self._context.connect(zmq.DEALER, endpoint, identity=name.encode())
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._outlet, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._outlet in ready:
                    frame = self._outlet.recv()
                    if not frame:
                        return
                    socket.send(frame)
                if socket in ready:
                    self._on_message(self._decode(socket.recv()))
        except zmq.ContextTerminated:
            return
        finally:
            socket.close()
            self._outlet.close()


@dataclass(eq=False)
class Heartbeat:
    """Sends Alive every ``interval_s``; never if that is 0."""

    send: Callable[[Alive], None]
    interval_s: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._due_at = self.clock()

    def beat(self) -> None:
        """Send Alive if it is due. Call this in every turn of a loop."""
        now_at = self.clock()
        if self.interval_s and now_at >= self._due_at:
            self._due_at = now_at + self.interval_s
            self.send(Alive())

    async def run(self) -> None:
        while self.interval_s:
            self.beat()
            await asyncio.sleep(self.interval_s)


if __name__ == "__main__":
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
