"""Reads what a child process is given: one line of JSON on its standard input.

Secrets so never stand in argv or environment. Standard input stays open: its end means that the
supervisor is gone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading

import msgspec

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.observe.logs import LogFormat
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.sockets import LaunchKeys

LISTEN_BACKLOG = 1024
"""Connections that wait to be accepted, at the router for as long as no router runs too."""
MAX_OPEN_FILES = 65_536
"""The number of descriptors that any process here needs at most; some systems allow a billion,
which slows down programs that walk over all.
"""
_PR_SET_PDEATHSIG = 1


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what the router process needs."""

    host: str
    port: int
    listeners: tuple[int, ...] = ()
    """Descriptors that it inherits: sockets that listen at the address, and belong to the
    supervisor.
    """
    served_model_name: str
    api_key: str | None
    """Clients send it; it opens no command."""
    max_body_bytes: int
    body_budget_bytes: int
    """Bounds all bodies in flight."""
    max_queued_requests: int
    max_connections: int
    request_timeout_s: float
    drain_timeout_s: float
    admin_api_key: str | None = None
    """Opens the commands over TCP; None: they are taken at the admin socket alone."""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    strict_fields: bool = False
    kept_requests: int = 500
    """Requests that have ended and of which it can tell."""
    page: bool = True
    """Answer at ``/`` with a page that shows the deployment."""
    by_cost: bool = True
    """Routes are chosen by cost; else pairs of engines come first."""
    max_itl_ms: float | None = None
    """Routes that keep these come first."""
    max_ttft_ms: float | None = None
    log_requests: bool = False
    """The supervisor shows the line of each request."""
    log_content: bool = False
    otlp_endpoint: str | None = None
    otlp_sample: float = 1.0


class DoorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Says where a sidecar opens its engine, which listens on a Unix socket, to other hosts."""

    bind_address: str
    advertise_address: str
    port: int
    """0: a free one."""
    data_ports: str
    """``kv_transfer.data_ports``, one of which is the side channel's."""
    max_model_len: int | None
    """None: the engine's own affair."""
    max_body_bytes: int
    """The limit of a client's body; routers send longer ones."""
    body_budget_bytes: int
    max_connections: int


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Holds identity, settings and keys of one child process."""

    name: str
    """``router``, ``prefill-0``, ``prefill-0/rank-0``."""
    incarnation: int
    control: str
    """ZMQ endpoint of the supervisor."""
    keys: LaunchKeys
    run_dir: str
    """Folder of this launch for sockets and rendezvous files; mode 0700."""
    log_level: str
    log_format: LogFormat = "text"
    engine_json: str | None = None
    """``EngineSpec`` of servers and ranks."""
    engine_api_key: str | None = None
    """Another router sends it to servers; the launch's own sends the token, but this key to engines
    that know no token.
    """
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    """A server registers that its engine can do this."""
    router: RouterSpec | None = None
    door: DoorSpec | None = None
    """Says where vLLM's sidecar lets other hosts reach its engine; None on a single host."""
    tp_rank: int = 0
    rendezvous: str = ""
    """``file://`` URL of this incarnation's TP group."""
    launch_id: str = ""
    step_record: int = -1
    """Rank 0's inherited descriptor of its ``StepRecord``."""
    port_is_kept: bool = False
    """The port of the server that ran before this one is kept for it."""
    heartbeat_s: float = 0.0
    """Seconds between two Alive messages of its main loop; 0: nobody listens."""

    def engine(self) -> EngineSpec:
        assert self.engine_json is not None
        return EngineSpec.model_validate_json(self.engine_json)


def read_bootstrap() -> Bootstrap:
    """Read the first line of standard input, then make sure that this process does not outlive the
    supervisor.
    """
    line = sys.stdin.buffer.readline()
    bootstrap = msgspec.json.decode(line, type=Bootstrap)
    die_with_parent()
    raise_open_files()
    return bootstrap


def raise_open_files() -> None:
    """Raise the soft limit of descriptors to the hard one: every connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_ends_to_supervisor() -> None:
    """Do nothing at SIGTERM and SIGINT from now on; ranks call it when they are ready.

    Slurm and systemd signal all processes of a launch at once: one that ended by itself would take
    along the requests that the supervisor waits for. It says Stop, or kills.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not SIG_IGN, which what this process starts would inherit.
        signal.signal(number, lambda *_: None)


def die_with_parent() -> None:
    """Make sure that this process ends with its parent, in two ways.

    The kernel sends a signal at the parent's death; the end of standard input covers the time
    before that is set.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    descriptor = sys.stdin.fileno()

    def watch() -> None:
        # Past the buffer of sys.stdin, whose lock, held by a thread that waits, would abort the
        # interpreter's exit.
        while os.read(descriptor, 4096):
            pass
        # The children of this process go too, where it leads a group of its own.
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-guard", daemon=True).start()
