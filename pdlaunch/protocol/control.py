"""Defines the control channel: every process (ZMQ DEALER) to the supervisor (ROUTER), and back.

A process registers its addresses, reports its state and receives the whole registry, with a growing
version, on every change.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.ids import EngineId, PromptOrigin
from pdlaunch.protocol.wire import Codec, Message

ProcessKind = Literal["router", "server", "rank"]
# ``stalled``: ready, but silent for long; ``failed``: a server whose engine died too often
ListedState = Literal["starting", "ready", "draining", "sleeping", "stalled", "failed"]
EndReason = Literal["died", "hung"]
# Why a ready engine, or the whole launch, gets no new work
Withheld = Literal["", "starting", "joining", "draining", "leaving"]
RefusalCode = Literal["engine_not_found", "not_now", "refused"]


def why_withheld(withheld: Withheld, engine: str = "") -> str:
    """Return the reason in words; empty without one."""
    words: dict[Withheld, str] = {
        "": "",
        "starting": "the deployment is starting",
        "joining": "it joins once its pairs are proven",
        "draining": f"no new work until `pdlaunch undrain {engine}`",
        "leaving": "it finishes what runs, and is removed",
    }
    return words[withheld]


class Address(Message, tag=False):
    """Tells where a process listens; empty strings where it has no such socket."""

    http: str = ""  # ``http://127.0.0.1:8101``
    kv_events: str = ""  # URL of the engine's KV events, if not ``http``
    requests: str = ""  # ZMQ endpoint of rank 0 for its engine's server
    side_channel: str = ""  # ``tcp://127.0.0.1:43210``; of a rank
    side_channels: tuple[str, ...] = ()  # those of all ranks of an engine of vLLM
    # Of the first sidecar of an engine over hosts: its ZMQ endpoint for workers on the others, and
    # the port at which vLLM's ranks meet.
    link: str = ""
    master_port: int = 0


class Capabilities(Message, tag=False):
    """What a router may expect of an engine.

    Native engines accept output tokens so far with a prompt, and name the first tokens in the
    answers of prefill. vLLM does neither. It does not verify what it pulls, so it pulls only over
    pairs that a canary has proven, and each lease once. It knows fields and models that the router
    does not know: bodies and answers pass unchanged.
    """

    kind: str = "native"
    version: str = ""  # of the engine's software; empty until it is known
    max_num_seqs: int = 0  # requests in one batch at most; 0: not known
    # Seconds for which a prefill engine of vLLM keeps blocks; 0: not known.
    lease_s: float = 0.0
    # Continues a prompt of token ids that ends with output tokens of another engine.
    continues: bool = False
    splits_reasoning: bool = False  # its answers to chats have the reasoning apart from the content
    # Routers authenticate with the launch's token; if False, with ``engine_api_key``, if any.
    takes_launch_token: bool = True

    @property
    def is_vllm(self) -> bool:
        return self.kind == "vllm"

    @property
    def goes_on(self) -> bool:
        """Return whether it can go on after output tokens of another engine."""
        return self.continues or not self.is_vllm


MODEL_CHANGED = "the model has changed since this launch began"  # the beginning of a ``reason``


class Entry(Message, tag=False):
    """Lists one living process, or the server of an engine that was given up, without address."""

    name: str  # ``router``, ``prefill-0``, ``prefill-0/rank-0``: unique, stable over restarts
    kind: ProcessKind
    incarnation: int
    host: str = ""  # name of its host; empty: the supervisor's own, or not known
    engine: str = ""
    role: Role | None = None
    # Devices of its ranks: ``cuda:0`` on its host, or ``cpu``; empty: not known.
    devices: tuple[str, ...] = ()
    tp_rank: int = 0
    tp_size: int = 1
    engine_id: EngineId = EngineId("")  # of a rank's TP group in this incarnation
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    state: ListedState = "starting"
    reason: str = ""  # why it is ``failed`` or ``withheld``, and what comes next; for people
    # The engines that a server's engine exchanges KV blocks with; None: all.
    peers: tuple[str, ...] | None = None
    withheld: Withheld = ""


class Register(Message):
    """Comes first from a process, and again when its addresses change."""

    name: str
    incarnation: int
    pid: int
    engine_id: EngineId = EngineId("")
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    listens: bool = True  # somebody listens at ``address.http`` already


class Progress(Message):
    """Tells what a starting process is doing; shown live."""

    text: str
    fraction: float | None = None


class Ready(Message):
    """Tells that the process does its job."""

    model: dict[str, str] = {}  # digests of the model's files that the process has read, by name


class Alive(Message):
    """Tells that the main loop of a process turns, every ``Bootstrap.heartbeat_s``."""


class PairReady(Message):
    """Tells that a decode rank has shaken hands with a prefill rank and verified a READ."""

    local: str
    peer: str
    peer_incarnation: int
    seconds: float
    path: str  # ``nixl/UCX`` and such: the fastest of those that can be used
    gigabytes_per_s: float | None = None
    other_paths: dict[str, str] = {}  # the speeds of the other paths, or why they cannot be used
    piece_bytes: int = 0  # size of the pieces that were read; 0: not known
    slow: str = ""  # what the supervisor finds slow, and why; empty: as fast as the link should be
    num_peers: int = 1  # ranks of the peer's engine that this one pulls from


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
    """Answers Drain: nothing is running any more, and nobody needs its KV blocks."""


class SleepState(Message):
    """Tells that a process that was ready cannot work for a while, or can again.

    Routers and peers keep away from it. Only servers are ``draining``: they take no new work.
    """

    state: Literal["awake", "draining", "sleeping"]


class Asked(Message):
    question: int  # comes back with the answer, an ``Answered``
    # When the asker gives up, on the monotonic clock that router and supervisor share. Later the
    # command is dropped, since its caller has got an error.
    expires_at: float = math.inf


class CommandToEngine(Asked, kw_only=True):
    name: str  # names the engine, or one of its processes


class Restart(CommandToEngine):
    """Asks, from the router, to start an engine anew."""


class SetDrained(CommandToEngine, kw_only=True):
    """Asks to give an engine no new work, or to give it work again."""

    is_drained: bool


class ChangeEngines(Asked):
    """Asks for another number of engines of some roles, or for an engine under another role."""

    # Roles that are not named keep theirs.
    replicas: dict[Role, Annotated[int, msgspec.Meta(ge=0, le=1024)]] = {}
    engine: str = ""  # the engine, or one of its processes, that takes ``role``
    role: Role | None = None
    dry_run: bool = False  # say what would be done, and do nothing
    # Seconds that running requests get at an engine that stops; None: ``drain_timeout_s``.
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None

    def __post_init__(self) -> None:
        if bool(self.replicas) == bool(self.engine and self.role):
            raise ValueError("give `replicas` of prefill, decode or both; or `engine` and `role`")


class PlannedEngine(Message, tag=False):
    """Describes an engine that is to start, on ``cpu`` or the ``cuda:N`` of each rank."""

    name: str
    role: Role
    host: str
    devices: list[str]
    num_threads: int


class PlannedChange(Message, tag=False):
    replicas: dict[Role, int]  # engines of each role once it is done
    starts: list[PlannedEngine]
    stops: dict[str, int]  # and their running requests, as the router counts them
    stops_first: bool
    # Seconds that running requests get at an engine that stops, before they go on elsewhere.
    drain_s: float


class Answered(Message):
    """Answers one of these commands: it is done or has begun, or ``error`` says why not."""

    question: int
    engine: str = ""
    incarnation: int = 0  # of the server that a restart replaces
    error: str = ""
    code: RefusalCode = "refused"
    notes: list[str] = msgspec.field(default_factory=list)
    change: PlannedChange | None = None  # the change that is made, or would be with ``dry_run``
    is_done: bool = True  # another answer follows when it is


# Commands of a router; the answer is an ``Answered``
Command = Restart | SetDrained | ChangeEngines
# What ``POST /pdlaunch/NAME`` asks of the supervisor; the body has the fields of the command.
COMMANDS: dict[str, type[Command]] = {"scale": ChangeEngines, "role": ChangeEngines}
ToSupervisor = (
    Register | Progress | Ready | Alive | PairReady | PairFailed | PairSuspect | Failed | Drained
    | SleepState | Command
)  # fmt: skip


class Registry(Message):
    """Lists all living processes and the engines that were given up; replaces the one before."""

    version: int
    entries: list[Entry]
    withheld: Withheld = ""  # why the router refuses requests
    pairs: list[PairReady] = []  # the paths between ranks that are proven now
    # How often processes have ended while the launch served, by name.
    ends: dict[str, dict[EndReason, int]] = {}
    text_files: dict[str, str] = {}  # digests of tokenizer and templates that servers use, by name


class Suspects(Message):
    """Tells the router that a rank has died by itself, and of which requests it may have died.

    It is sent before the registry without that rank.
    """

    origins: list[PromptOrigin]  # ``AddRequest.origin`` of the requests in the last step
    repeated: list[PromptOrigin]  # those that were suspects already: one at most


class Drain(Message):
    """Take no new work; say Drained when the running work is done, or after ``timeout_s``."""

    timeout_s: float


class Stop(Message):
    """Tells a child to exit now and cleanly."""


class Happened(Message):
    """Tells the router what the supervisor has told people: a death, a restart, a drain."""

    text: str
    prefill: str = ""
    decode: str = ""  # the engines of a pair that has failed


FromSupervisor = Registry | Suspects | Drain | Stop | Answered | Happened

to_supervisor: Codec[ToSupervisor] = Codec(ToSupervisor)
from_supervisor: Codec[FromSupervisor] = Codec(FromSupervisor)
