"""Defines the control channel: every process (ZMQ DEALER) to the supervisor (ROUTER), and back.

A process registers its addresses, reports its state and receives the whole registry, with a growing
version, on every change.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.changes import (
    Answered,
    AwaitIdle,
    ChangeEngines,
    EngineIdle,
    SetDrained,
    Withheld,
)
from pdlaunch.protocol.ids import EngineId, PromptOrigin
from pdlaunch.protocol.wire import Codec, Message

ProcessKind = Literal["router", "server", "rank"]
ListedState = Literal["starting", "ready", "draining", "sleeping", "stalled", "failed"]
"""``stalled``: ready, but silent for long; ``failed``: a server whose engine died too often."""
EndReason = Literal["died", "hung"]


class Address(Message, tag=False):
    """Tells where a process listens; empty strings where it has no such socket."""

    http: str = ""
    """``http://127.0.0.1:8101``"""
    requests: str = ""
    """ZMQ endpoint of rank 0 for its engine's server."""
    steps: str = ""
    """ZMQ endpoint of rank 0 for the other ranks of the TP group."""
    side_channel: str = ""
    """``tcp://127.0.0.1:43210``; of a rank, or of an engine of vLLM."""


class Capabilities(Message, tag=False):
    """Tells what an engine can do; the router reads it instead of assuming it."""

    verifies: bool = False
    """Pulled KV blocks are proven before use."""
    resumes: bool = False
    """Accepts output tokens so far with a prompt."""
    gives_first_token: bool = False
    """Answers do_remote_decode with the first token under the ``pdlaunch`` key."""
    kind: str = "native"
    version: str = ""
    """Version of the engine's software; empty until it is known."""
    needs_proof: bool = False
    """Does not verify what it pulls, so it pulls only over pairs that a canary has proven. A lease
    is read once.
    """
    lease_s: float = 0.0
    """Seconds for which a prefill engine that needs proof keeps blocks; 0: not known."""
    continues: bool = False
    """Goes on after output tokens that stand behind the token ids of their prompt."""
    splits_reasoning: bool = False
    """Its answers to chats have the reasoning apart from the content."""
    has_own_fields: bool = False
    """Knows fields and models that the router does not: bodies and answers pass unchanged."""
    takes_launch_token: bool = True
    """Asks routers for the launch's token; else for ``engine_api_key``, where that is set."""

    @property
    def goes_on(self) -> bool:
        """Return whether it can go on with an answer that another engine has begun."""
        return self.resumes or self.continues


class Entry(Message, tag=False):
    """Lists one living process, or the server of an engine that was given up, without address."""

    name: str
    """``router``, ``prefill-0``, ``prefill-0/rank-0``: unique, stable over restarts."""
    kind: ProcessKind
    incarnation: int
    host: str = ""
    """Name of its host; empty: the supervisor's own, or not known."""
    engine: str = ""
    role: Role | None = None
    devices: tuple[str, ...] = ()
    """Those of its ranks, as ``cuda:0`` on its host, or ``cpu``; empty: not known."""
    tp_rank: int = 0
    tp_size: int = 1
    engine_id: EngineId = EngineId("")
    """The id of a rank's TP group in this incarnation."""
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    state: ListedState = "starting"
    reason: str = ""
    """Why it is ``failed`` or ``withheld``, and what comes next; for people."""
    peers: tuple[str, ...] | None = None
    """The engines that a server's engine exchanges KV blocks with; None: all."""
    withheld: Withheld = ""
    """Why routers give a server's engine no new work though it is ready."""


class Register(Message):
    """Registers a process, as its first message and when its addresses change."""

    name: str
    incarnation: int
    pid: int
    engine_id: EngineId = EngineId("")
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    listens: bool = True
    """Somebody listens at ``address.http`` already."""


class Progress(Message):
    """Tells what a starting process is doing; shown live."""

    text: str
    fraction: float | None = None


class Ready(Message):
    """Tells that the process does its job. ``info`` is shown in the ready panel."""

    info: dict[str, str] = {}


class Alive(Message):
    """Tells that the main loop of a process turns, every ``Bootstrap.heartbeat_s``."""


class PairReady(Message):
    """Tells that a decode rank has proven the path to a prefill rank: the handshake is done and a
    small READ was verified.
    """

    local: str
    peer: str
    peer_incarnation: int
    seconds: float
    path: str
    """``nixl/UCX`` and such: the fastest of those that can be used."""
    gigabytes_per_s: float | None = None
    other_paths: dict[str, str] = {}
    """The speeds of the other paths, or why they cannot be used."""
    num_peers: int = 1
    """Ranks of the peer's engine that this one pulls from."""


class PairFailed(Message):
    """Tells that the handshake of a pair failed; ``fatal``: the engines are incompatible."""

    local: str
    peer: str
    error: str
    fatal: bool


class PairSuspect(Message):
    """Tells, from the router, that a proven pair has served by decoding alone.

    The pair counts as proven again after its next canary.
    """

    local: str
    peer: str
    peer_incarnation: int
    error: str


class Failed(Message):
    """Tells why the process is about to exit; ``error`` is for the user."""

    error: str


class Drained(Message):
    """Answers Drain: nothing is running any more."""


class SleepState(Message):
    """Tells that a process that was ready cannot work for a while, or can again.

    The registry shows it, and routers and peers keep away. A server says ``draining`` when it takes
    no new work, ``sleeping`` when the engine sleeps; a rank says ``sleeping`` when its memory
    cannot be read by peers any more. Both say ``awake`` when they are ready again.
    """

    state: Literal["awake", "draining", "sleeping"]


class Restart(Message):
    """Asks, from the router, to start an engine anew; answered with Restarting."""

    question: int
    """Comes back with the answer."""
    name: str
    """Names the engine, or one of its processes."""


class ServedRequest(Message):
    """Tells, from the router, of a request that has ended; ``line`` is escaped for terminals."""

    line: str


ToSupervisor = (
    Register
    | Progress
    | Ready
    | Alive
    | PairReady
    | PairFailed
    | PairSuspect
    | Failed
    | Drained
    | SleepState
    | Restart
    | SetDrained
    | ChangeEngines
    | EngineIdle
    | ServedRequest
)


class Registry(Message):
    """Lists all living processes and the engines that were given up; replaces the one before."""

    version: int
    entries: list[Entry]
    serving: bool = True
    """Every process and pair has been ready; before that the router takes no request."""
    pairs: list[PairReady] = []
    """The paths between ranks that are proven now."""
    ends: dict[str, dict[EndReason, int]] = {}
    """Counts the ends of processes while the launch served, by name."""


class Suspects(Message):
    """Tells the router that a rank has died by itself, and of which requests it may have died.

    It is sent before the registry without that rank.
    """

    origins: list[PromptOrigin]
    """``AddRequest.origin`` of the requests in the last step."""
    repeated: list[PromptOrigin]
    """Requests among ``origins`` that were suspects already: one at most."""


class Drain(Message):
    """Take no new work; say Drained when the running work is done, or after ``timeout_s``."""

    timeout_s: float


class Stop(Message):
    """Tells a child to exit now and cleanly."""


class Restarting(Message):
    """Answers Restart: it has begun, or ``error`` says why not."""

    question: int
    engine: str = ""
    incarnation: int = 0
    """The incarnation of the server that is replaced."""
    error: str = ""


class Happened(Message):
    """Tells the router what the supervisor has told people: a death, a restart, a drain."""

    text: str
    ago_s: float = 0.0
    prefill: str = ""
    decode: str = ""
    """The engines of a pair that has failed."""


FromSupervisor = Registry | Suspects | Drain | Stop | Restarting | Answered | AwaitIdle | Happened

to_supervisor: Codec[ToSupervisor] = Codec(ToSupervisor)
from_supervisor: Codec[FromSupervisor] = Codec(FromSupervisor)
