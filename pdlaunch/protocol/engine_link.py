"""Messages between a sidecar and pdlaunch's KV connector, which runs in vLLM's processes.

::

    sidecar ── setup file ────────────────> connector    before the start of vLLM
            <── RankUp, PairReady, ... ──── worker       ZMQ DEALER; the sidecar has the ROUTER
            ── Peers ─────────────────────> worker       ranks of the other engines
            <── GrantLease ──────────────── EngineCore   passed on to its workers

Grants also travel with vLLM's steps. But the next step may begin after a step with other prompts:
220 ms later on an H100, seconds later on a CPU.

The connector imports this module in vLLM's environment: only packages of vLLM are there.
"""

from collections.abc import Iterable

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Address, Entry, PairFailed, PairReady, SleepState
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.sockets import LaunchKeys
from pdlaunch.protocol.transfer import GrantLease
from pdlaunch.protocol.wire import Codec, Message

# Environment variable of vLLM's processes: the path of the setup file
KV_SETUP = "PDLAUNCH_KV_SETUP"


class ConnectorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the workers of an engine of vLLM exchange KV blocks through pdlaunch's connector."""

    role: Role
    bind_address: str  # where side channels of workers listen
    advertise_address: str  # address of these side channels for other hosts
    kv_transfer: str  # ``KVTransferSettings`` as JSON
    by_head: bool  # engines have different TP sizes, so they exchange heads, not whole pages
    engine_id: EngineId  # of this incarnation; ``id_of`` gives that of a data parallel rank
    dp_size: int = 1  # data parallel ranks of the engine

    def id_of(self, dp_rank: int) -> EngineId:
        return dp_engine_id(self.engine_id, dp_rank, self.dp_size)


class KVSetup(ConnectorSpec, frozen=True, kw_only=True):
    """Settings of the connector, as JSON in the setup file (mode 0600)."""

    name: str  # name of the engine: ``decode-0``
    incarnation: int
    keys: LaunchKeys  # without token and certificate, because workers use only ZMQ
    link: str  # ZMQ endpoint of the engine's first sidecar
    model_digest: str  # digest of the model's files before the start; empty: not known


class RankUp(Message):
    """Sent by a worker when its transfer thread listens."""

    tp_rank: int
    tp_size: int
    engine_id: EngineId  # that of its data parallel rank
    side_channel: str
    dp_rank: int = 0


class PullFailure(Message):
    peer_engine: str  # ``prefill-0``
    error: str


class Peers(Message):
    """Lists the ranks of other engines of vLLM; sent to workers after RankUp and at each change."""

    entries: list[Entry]  # all of kind ``rank``


# PairReady and PairFailed name ranks: ``decode-0/rank-1`` and ``prefill-0/rank-0``
FromWorker = RankUp | PullFailure | PairReady | PairFailed | SleepState
FromEngine = FromWorker | GrantLease
ToWorker = Peers | GrantLease

from_engine: Codec[FromEngine] = Codec(FromEngine)
to_worker: Codec[ToWorker] = Codec(ToWorker)


def rank_name(engine: str, tp_rank: int) -> str:
    """Return the name of a rank in pairs and entries: ``decode-0/rank-1``."""
    return f"{engine}/rank-{tp_rank}"


def dp_engine(engine: str, dp_rank: int, dp_size: int) -> str:
    """Return the name of a data parallel rank. Other ranks treat it as a separate engine."""
    return engine if dp_size == 1 else f"{engine}/dp-{dp_rank}"


def dp_engine_id(engine_id: EngineId, dp_rank: int, dp_size: int) -> EngineId:
    """Return the engine_id of a data parallel rank."""
    return engine_id if dp_size == 1 else EngineId(f"{engine_id}_dp{dp_rank}")


def engine_of_rank(name: str) -> str:
    """Return the engine's name in ``decode-0/rank-1`` or ``decode-0/dp-0/rank-1``."""
    return name.partition("/")[0]


def rank_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Return an entry for each rank of those engines of vLLM that have started.

    A starting engine is left out: a READ from a GPU during the capture of CUDA graphs breaks it.
    """
    return [
        msgspec.structs.replace(
            entry,
            name=rank_name(engine, tp_rank),
            kind="rank",
            engine=engine,
            engine_id=dp_engine_id(entry.engine_id, dp_rank, dp_size_of(entry)),
            tp_rank=tp_rank,
            address=Address(side_channel=side_channel),
        )
        for entry in entries
        if entry.state not in ("starting", "failed")
        for place, side_channel in enumerate(entry.address.side_channels)
        for dp_rank, tp_rank in [divmod(place, entry.tp_size)]
        for engine in [dp_engine(entry.name, dp_rank, dp_size_of(entry))]
    ]


def dp_size_of(entry: Entry) -> int:
    """Return the number of data parallel ranks of an engine of vLLM that has started."""
    return max(1, len(entry.address.side_channels) // entry.tp_size)
