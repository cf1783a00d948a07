"""The side channel between ranks of different engines (ZMQ DEALER of the puller, ROUTER of the rank
that holds the blocks).

``handshake`` once a pair and incarnation, then for each pull ``pull_begin+ -> state_checksums ->
heartbeat* -> pull_end``. Seconds are remaining seconds: clocks differ between hosts.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdlaunch.protocol.ids import EngineId, LeaseId, ReaderId
from pdlaunch.protocol.kv_params import FirstToken
from pdlaunch.protocol.wire import Codec, Message

PROTOCOL_VERSION = 3
LONGEST_WAIT_S = 60.0
"""A reader that awaits a prompt is refused after this time, and comes later: the prompt may be far
from computed.
"""

_IS_ID = msgspec.Meta(min_length=1, max_length=256)
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
"""How many, or the address of the first."""
Seconds = Annotated[float, msgspec.Meta(ge=0)]
"""No NaN either: deadlines are made of it."""


class Compatibility(Message, tag=False):
    """What must be equal on both sides, field by field; a mismatch is named with both values."""

    protocol_version: int
    pdlaunch_version: str
    model_digest: str
    """SHA-256 over the model's content (config, tensor names and shapes, samples of the
    weights).
    """
    dtype: str
    kv_dtype: str
    block_size: int
    groups: str
    """Layers and window of each KV cache group, in one line."""
    num_kv_heads: int
    """Of the whole model."""
    head_dim: int
    layout: str
    connector: str
    checksum: str
    """Algorithm name, or ``off``."""


class Geometry(Message, tag=False):
    """Where this rank's KV blocks lie."""

    base_address: Bytes
    num_blocks: Count
    block_bytes: Bytes
    head_bytes: Bytes
    num_kv_heads: Count
    """KV heads of this rank."""
    first_kv_head: Count
    """Global index of its first one."""
    device_index: Count
    """0 on a CPU."""
    scratch_address: Bytes = 0
    scratch_bytes: Bytes = 0
    """Memory with a pattern that follows from the agent's name; peers read it to prove the path."""


class Handshake(Message):
    """Ask a rank for what is needed to read its blocks."""

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    """Of the puller; tells apart peers and incarnations."""
    rank_name: Annotated[str, _IS_ID]
    incarnation: int
    expected_engine_id: Annotated[EngineId, _IS_ID]
    """From the registry; the answer must carry the same."""
    compatibility: Compatibility
    agent_metadata: bytes


class HandshakeReply(Message):
    call_id: int
    engine_id: EngineId
    rank_name: str
    incarnation: int
    tp_rank: int
    tp_size: int
    compatibility: Compatibility
    geometry: Geometry
    agent_name: str
    agent_metadata: bytes


class PullBegin(Message):
    """Ask for a leased request's blocks; extends the lease. A reader whose READ failed asks again
    before it ends.

    With ``awaits`` it may be asked while the prompt is computed; the answer waits until more is
    known than the reader knows, and only the one that tells of the lease begins the reader's share
    of it.
    """

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    """Of the rank asked; another id is answered with Refused."""
    lease_id: Annotated[LeaseId, _IS_ID] = msgspec.field(name="request_id")
    reader: Annotated[ReaderId, _IS_ID]
    """Names this pull: unique over engines, ranks and choices."""
    num_decode_ranks: int = msgspec.field(name="num_pullers")
    """Ranks of the decode engine's TP group that pull from this rank."""
    awaits: bool = False
    """There need not be a lease yet."""
    version: Count = 0
    """Of the latest answer; the next one is another, or tells of the lease."""


class GroupBlocks(Message, tag=False):
    """One KV cache group of a leased request."""

    first_block_index: int
    """Logical index within the request of the first block below; earlier ones have left the
    window.
    """
    block_ids: list[int]
    checksums: bytes | None
    """By block and KV head of this rank, 8 bytes each, little-endian; None when verify is off or
    they are stated later.
    """


class PullReply(Message):
    """The blocks of a request: all of a lease, or, to who awaits one, those that the computation
    has so far.
    """

    call_id: int
    num_tokens: int
    """Of the prompt."""
    block_hashes: list[bytes]
    """Chained token hashes of the prompt's blocks, the last one possibly partial; 32 bytes each."""
    groups: list[GroupBlocks]
    lease_s: Seconds
    """0 without a lease."""
    first_tokens: list[FirstToken] = []
    leased: bool = True
    """Else blocks may be taken back at any time: what was read of them counts once a lease of this
    ``generation`` is there.
    """
    num_ready_blocks: Count = 0
    """Without a lease: logical blocks, from the beginning of the prompt, that nothing writes to any
    more.
    """
    generation: Count = 0
    """Of the computation that the blocks are of: those of another one may have been another
    request's in between.
    """
    version: Count = 0
    """Without a lease: changes with every other field."""


class StateChecksums(Message):
    """Ask for the checksums of all blocks of a lease, of which the reader has begun a pull; the
    answer waits for them.
    """

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, _IS_ID] = msgspec.field(name="request_id")
    reader: Annotated[ReaderId, _IS_ID]


class ChecksumsReply(Message):
    call_id: int
    groups: list[bytes | None]
    """As in GroupBlocks."""


class Heartbeat(Message):
    """A pull is still pending: extend the lease."""

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, _IS_ID] = msgspec.field(name="request_id")
    reader: Annotated[ReaderId, _IS_ID]


class HeartbeatReply(Message):
    call_id: int
    lease_s: Seconds


class PullEnd(Message):
    """The reader needs the lease no more: it has all bytes, or has given up."""

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, _IS_ID] = msgspec.field(name="request_id")
    reader: Annotated[ReaderId, _IS_ID]


class PullEndReply(Message):
    """The holder knows. A reader proves by itself that its lease has held."""

    call_id: int
    held: bool
    """The lease held from pull_begin until now."""


class Push(Message):
    """Ask a rank whose connector writes to its readers to write blocks of a lease; without block
    ids: its scratch.
    """

    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, msgspec.Meta(max_length=256)] = msgspec.field(name="request_id")
    reader: Annotated[ReaderId, msgspec.Meta(max_length=256)]
    """As in the PullBegin."""
    block_ids: list[int]
    """Of the rank asked."""
    first_head: int
    """Index within the rank asked."""
    num_heads: int
    target: bytes
    """Where to, in the words of the connector."""


class PushEnded(Message):
    """The write is over. ``ok``: every byte is in the reader's memory."""

    call_id: int
    ok: bool
    error: str = ""


class Refused(Message):
    """The question cannot be answered; the asker treats it as a failed pull or handshake."""

    call_id: int
    reason: str


ToPrefillSide = Handshake | PullBegin | StateChecksums | Heartbeat | PullEnd | Push
ToDecodeSide = (
    HandshakeReply
    | PullReply
    | ChecksumsReply
    | HeartbeatReply
    | PullEndReply
    | PushEnded
    | Refused
)

to_prefill_side: Codec[ToPrefillSide] = Codec(ToPrefillSide)
to_decode_side: Codec[ToDecodeSide] = Codec(ToDecodeSide)
