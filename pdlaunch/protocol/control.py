"""Defines the messages between every process (ZMQ DEALER) and the supervisor (ROUTER).

A process registers its addresses and reports its state. On every change the supervisor sends the
whole registry, with a version that grows.
"""

import bisect
import hashlib
import math
from collections.abc import Collection, Iterator
from typing import Annotated, Literal

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.ids import EngineId, PromptOrigin
from pdlaunch.protocol.wire import Codec, Message

ProcessKind = Literal["router", "server", "rank"]
# ``stalled``: ready, but silent for a long time; ``failed``: its engine died too often
ListedState = Literal["starting", "ready", "draining", "sleeping", "stalled", "failed"]
EndReason = Literal["died", "hung"]
# Reason why a ready engine, or the whole launch, gets no new work; empty: it gets work
Withheld = Literal["", "starting", "joining", "draining", "leaving"]
RefusalCode = Literal["engine_not_found", "not_now", "refused"]
# The reason in words; ``{}``: the engine's name
WHY_WITHHELD: dict[Withheld, str] = {
    "": "",
    "starting": "the deployment is starting",
    "joining": "it joins once its pairs are proven",
    "draining": "no new work until `pdlaunch undrain {}`",
    "leaving": "it is removed after its running requests",
}


class Address(Message, tag=False):
    """The addresses at which a process listens; an empty string: it has no such socket."""

    http: str = ""  # ``http://127.0.0.1:8101``
    kv_events: str = ""  # URL of the engine's KV events, if not ``http``
    requests: str = ""  # ZMQ endpoint of a rank 0, for its engine's server
    side_channel: str = ""  # side channel of a rank: ``tcp://127.0.0.1:43210``
    side_channels: tuple[str, ...] = ()  # side channels of all ranks of an engine of vLLM
    # Set by the first sidecar of an engine over hosts: its ZMQ endpoint for workers on the other
    # hosts, and the port at which vLLM's ranks meet.
    link: str = ""
    master_port: int = 0


class Capabilities(Message, tag=False):
    """What an engine can do, for the router.

    Prefill answers of native engines, and of vLLM with pdlaunch's connector, contain the first
    tokens. A native engine continues after output tokens of another engine; vLLM takes them only
    as the end of a prompt. vLLM does not verify pulled blocks, so it pulls only over pairs that
    a canary has proven, and each lease once. vLLM knows fields and models that the router does not
    know, so the router passes bodies and answers unchanged.
    """

    kind: str = "native"
    version: str = ""  # of the engine's software; empty until it is known
    max_num_seqs: int = 0  # largest batch, in requests; 0: not known
    lease_s: float = 0.0  # seconds for which a prefill engine of vLLM keeps blocks; 0: not known
    # An engine of vLLM that continues token ids which end with another engine's output tokens.
    continues: bool = False
    splits_reasoning: bool = False  # chat answers have separate members for reasoning and content
    # Routers authenticate with the launch's token; if False, with ``engine_api_key`` if that is set
    takes_launch_token: bool = True

    @property
    def is_vllm(self) -> bool:
        return self.kind == "vllm"

    @property
    def can_continue(self) -> bool:
        return self.continues or not self.is_vllm


MODEL_CHANGED = "the model has changed since this launch began"  # start of such a ``reason``


class Entry(Message, tag=False):
    """One living process, or the server of a failed engine (without address)."""

    name: str  # ``router``, ``prefill-0``, ``prefill-0/rank-0``: unique, the same after a restart
    kind: ProcessKind
    incarnation: int
    host: str = ""  # name of its host; empty: the supervisor's own, or not known
    engine: str = ""
    role: Role | None = None
    devices: tuple[str, ...] = ()  # of its ranks: ``cuda:0`` or ``cpu``; empty: not known
    tp_rank: int = 0
    tp_size: int = 1
    engine_id: EngineId = EngineId("")  # id of a rank's TP group in this incarnation
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    state: ListedState = "starting"
    reason: str = ""  # text for people: why it is ``failed`` or ``withheld``, and what comes next
    # Of a server: the engines with which its engine exchanges KV blocks; None: all.
    peers: tuple[str, ...] | None = None
    withheld: Withheld = ""


class Register(Message):
    """First message of a process; sent again when its addresses change."""

    name: str
    incarnation: int
    engine_id: EngineId = EngineId("")
    address: Address = msgspec.field(default_factory=Address)
    capabilities: Capabilities = msgspec.field(default_factory=Capabilities)
    listens: bool = True  # ``address.http`` accepts connections already


class Progress(Message):
    """Reports what a starting process is doing; the terminal shows it."""

    text: str
    fraction: float | None = None


class Ready(Message):
    model: dict[str, str] = {}  # file name -> digest of each file of the model that it has read


class Alive(Message):
    """Reports that the main loop of a process runs; sent every ``Bootstrap.heartbeat_s``."""


class PairReady(Message):
    """Reports that a decode rank has shaken hands with a prefill rank and verified a READ."""

    local: str
    peer: str
    peer_incarnation: int
    path: str  # the fastest usable path, such as ``nixl/UCX``
    gigabytes_per_s: float | None = None
    other_paths: dict[str, str] = {}  # speed of each other path, or why it cannot be used
    piece_bytes: int = 0  # size of the pieces that were read; 0: not known
    slow: str = ""  # set by the supervisor: why the path is slower than its link; empty: it is not
    num_peers: int = 1  # ranks of the peer's engine from which this rank pulls


class PairFailed(Message):
    """Reports that the handshake of a pair failed; ``fatal``: the engines are incompatible."""

    local: str
    peer: str
    error: str
    fatal: bool


class PairSuspect(Message):
    """Sent by the router: a proven pair answered a request, but decode recomputed the prompt.

    The pair counts as proven again after its next canary.
    """

    local: str
    peer: str
    peer_incarnation: int
    error: str


class Failed(Message):
    error: str  # for the user; the process is about to exit


class Drained(Message):
    """Answers Drain: no request runs any more, and no other engine needs its KV blocks."""


class SleepState(Message):
    """Reports that a ready process cannot work for a while, or that it can work again.

    Routers and peers do not use it meanwhile. Only servers can be ``draining``: no new work.
    """

    state: Literal["awake", "draining", "sleeping"]


class Asked(Message):
    question: int  # number that the answer, an ``Answered``, repeats
    # When the sender gives up, on the monotonic clock that router and supervisor share. After that
    # the supervisor drops the command, since the caller has got an error.
    expires_at: float = math.inf


class Restart(Asked, kw_only=True):
    name: str  # name of the engine, or of one of its processes


class SetDrained(Asked, kw_only=True):
    """Withhold new work from an engine, or give it work again."""

    name: str  # name of the engine, or of one of its processes
    is_drained: bool


class ChangeEngines(Asked):
    """Change the number of engines of some roles, or the role of one engine."""

    # Roles that are not in it keep their number of engines.
    replicas: dict[Role, Annotated[int, msgspec.Meta(ge=0, le=1024)]] = {}
    engine: str = ""  # name of the engine that takes ``role``, or of one of its processes
    role: Role | None = None
    dry_run: bool = False  # answer with the planned change, and change nothing
    # Seconds for the running requests of an engine that stops; None: ``drain_timeout_s``.
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None

    def __post_init__(self) -> None:
        if bool(self.replicas) == bool(self.engine and self.role):
            raise ValueError("give `replicas` of prefill, decode or both; or `engine` and `role`")


class PlannedEngine(Message, tag=False):
    """An engine that will start; ``devices`` has ``cpu``, or the ``cuda:N`` of each rank."""

    name: str
    role: Role
    host: str
    devices: list[str]
    num_threads: int


class PlannedChange(Message, tag=False):
    replicas: dict[Role, int]  # engines of each role after the change
    starts: list[PlannedEngine]
    stops: dict[str, int]  # engine -> its running requests, as the router counts them
    stops_first: bool
    # Seconds for the running requests of an engine that stops, before other engines continue them.
    drain_s: float


class Answered(Message):
    """Answers a command: it is done or has begun, or ``error`` says why not."""

    question: int
    engine: str = ""
    incarnation: int = 0  # after Restart: that of the server which is replaced
    error: str = ""
    code: RefusalCode = "refused"
    notes: list[str] = msgspec.field(default_factory=list)
    change: PlannedChange | None = None  # the change that is made; with ``dry_run``, the plan
    is_done: bool = True  # if False, another answer follows when the command is done


# Commands of a router; the answer is an ``Answered``
Command = Restart | SetDrained | ChangeEngines
# The command that ``POST /pdlaunch/NAME`` sends; the HTTP body has the fields of the command.
COMMANDS: dict[str, type[Command]] = {"scale": ChangeEngines, "role": ChangeEngines}
ToSupervisor = (
    Register | Progress | Ready | Alive | PairReady | PairFailed | PairSuspect | Failed | Drained
    | SleepState | Command
)  # fmt: skip


class Registry(Message):
    """Lists all living processes and the failed engines; replaces the previous registry."""

    version: int
    entries: list[Entry]
    withheld: Withheld = ""  # why the router refuses requests
    pairs: list[PairReady] = []  # pairs of ranks that are proven now
    # Process name -> how often it has ended while the launch served, by reason.
    ends: dict[str, dict[EndReason, int]] = {}
    text_files: dict[str, str] = {}  # file name -> digest of tokenizer and templates in use


class Suspects(Message):
    """Names requests that may have killed a rank; sent before the registry without that rank."""

    origins: list[PromptOrigin]  # ``AddRequest.origin`` of the requests in the last step
    repeated: list[PromptOrigin]  # those that were already suspects; one at most


class Drain(Message):
    """Accept no new work; send Drained when the running work is done, or after ``timeout_s``."""

    timeout_s: float


class Stop(Message):
    """Exit now, cleanly."""


class Happened(Message):
    """Passes a message of the supervisor's terminal to the router: a death, a restart, a drain."""

    text: str
    prefill: str = ""  # with ``decode``: the engines of a pair that has failed
    decode: str = ""


FromSupervisor = Registry | Suspects | Drain | Stop | Answered | Happened

to_supervisor: Codec[ToSupervisor] = Codec(ToSupervisor)
from_supervisor: Codec[FromSupervisor] = Codec(FromSupervisor)


# Each pair costs a handshake and a proof; so their number grows linearly with the engines.
MAX_PEERS = 8  # engines of the other role that an engine chooses; others may choose it as well

Pair = tuple[str, str]  # names of a prefill and a decode engine


def due_pairs(prefill: Collection[str], decode: Collection[str]) -> set[Pair]:
    """Return the pairs to use. Each engine has at least ``MAX_PEERS`` peers, or all engines of the
    other role. An engine that comes or goes changes few pairs of the others.
    """
    pairs = set(_followers(prefill, decode))
    return pairs | {(first, second) for second, first in _followers(decode, prefill)}


def _followers(names: Collection[str], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each name with the ``MAX_PEERS`` others that follow it on a ring ordered by hashes."""
    ring = sorted((_place(other), other) for other in others)
    for name in names:
        first = bisect.bisect(ring, (_place(name), name))
        for step in range(min(MAX_PEERS, len(ring))):
            yield name, ring[(first + step) % len(ring)][1]


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
