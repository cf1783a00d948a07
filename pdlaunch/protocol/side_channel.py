"""Messages of the side channel: questions of a decode rank (DEALER), answers of a prefill rank
(ROUTER).

A pair shakes hands once for each incarnation. Each pull then sends ``PullBegin, StateChecksums,
PullHeartbeat*, PullEnd``. Times are remaining seconds, because clocks of hosts differ.
"""

from typing import Annotated, Literal

import msgspec

from pdlaunch.protocol.ids import EngineId, LeaseId, ReaderId
from pdlaunch.protocol.transfer import LeaseEnd
from pdlaunch.protocol.wire import Codec, Message

PROTOCOL_VERSION = 9

_IS_ID = msgspec.Meta(min_length=1, max_length=256)
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # a number of bytes, or an address
Seconds = Annotated[float, msgspec.Meta(ge=0)]  # not NaN, since deadlines are computed from it


class Compatibility(Message, tag=False):
    """Properties that must be equal on both sides. An error names the fields that differ."""

    protocol_version: int
    pdlaunch_version: str
    # SHA-256 of the model's config, tensor names and shapes, and samples of the weights.
    model_digest: str
    dtype: str
    kv_dtype: str
    block_size: int
    groups: str  # layers and window of each KV cache group, in one line
    num_kv_heads: int  # KV heads of the whole model
    head_dim: int
    layout: str
    connector: str
    checksum: str  # algorithm name, or ``off``


class RegionPlace(msgspec.Struct, frozen=True, array_like=True):
    """Head h of block b is at ``address + b * stride_bytes + h * head_bytes``."""

    address: Bytes
    stride_bytes: Bytes
    head_bytes: Bytes


class Geometry(Message, tag=False):
    regions: list[RegionPlace]
    num_blocks: NonNegative
    num_kv_heads: NonNegative  # KV heads of this rank
    first_kv_head: NonNegative  # index of its first KV head in the model
    device_index: NonNegative  # 0 on a CPU
    # Memory with a pattern derived from the agent's name; peers read it to prove the path.
    scratch_address: Bytes = 0
    scratch_bytes: Bytes = 0
    memory_kind: Literal["DRAM", "VRAM"] = "DRAM"


class Handshake(Message):
    call_id: int
    # The prefill engine's id in the registry; the answer must have the same id.
    engine_id: Annotated[EngineId, _IS_ID]
    rank_name: Annotated[str, _IS_ID]  # of the decode rank, which compares both sides
    incarnation: int


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


class LeaseQuestion(Message):
    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]  # id of the prefill engine; other ranks send Refused
    lease_id: Annotated[LeaseId, _IS_ID]
    reader: Annotated[ReaderId, _IS_ID]  # id of the pull, unique over engines, ranks and choices


class PullBegin(LeaseQuestion):
    """Request and extend a lease; sent again after a failed READ."""

    num_decode_ranks: int  # ranks of the decode engine's TP group that pull from the prefill rank


class GroupBlocks(Message, tag=False):
    # Logical index of the first of ``block_ids``; earlier blocks have left the window.
    first_block_index: int
    block_ids: list[int]


class PullReply(Message):
    call_id: int
    num_tokens: int  # tokens of the prompt
    # Chained token hashes of the prompt's blocks, the last one possibly partial; 32 bytes each.
    block_hashes: list[bytes]
    groups: list[GroupBlocks]
    lease_s: Seconds


class StateChecksums(LeaseQuestion):
    """Request the checksums of a lease's blocks; the answer comes when they are computed."""


class ChecksumsReply(Message):
    call_id: int
    # For each KV cache group: checksums of each leased block and each KV head of the prefill rank,
    # 8 bytes each, little-endian.
    groups: list[bytes]


class PullHeartbeat(LeaseQuestion):
    """Extend the lease of a running pull."""


class HeartbeatReply(Message):
    call_id: int
    lease_s: Seconds  # remaining seconds of the lease


class PullEnd(LeaseQuestion):
    """End the reader's use of a lease. There is no answer: the reader checks the time itself."""


class Push(LeaseQuestion):
    """Request a prefill rank to write blocks of a lease, or its scratch without block ids."""

    lease_id: Annotated[LeaseId, msgspec.Meta(max_length=256)]
    reader: Annotated[ReaderId, msgspec.Meta(max_length=256)]
    block_ids: list[list[int]]  # blocks of the prefill rank, by group
    first_head: int  # index within the prefill rank
    num_heads: int
    target: bytes  # where to write, in the connector's own encoding


class PushEnded(Message):
    """Answers Push when the write has ended. ``ok``: every byte is in the reader's memory."""

    call_id: int
    ok: bool
    error: str = ""


class Refused(Message):
    """Answers a question with an error: the pull or the handshake has failed."""

    call_id: int
    reason: str
    lease_end: LeaseEnd | None = None  # if set, the lease has ended, and the pair is not at fault


ToPrefillSide = Handshake | PullBegin | StateChecksums | PullHeartbeat | PullEnd | Push
ToDecodeSide = HandshakeReply | PullReply | ChecksumsReply | HeartbeatReply | PushEnded | Refused

to_prefill_side: Codec[ToPrefillSide] = Codec(ToPrefillSide)
to_decode_side: Codec[ToDecodeSide] = Codec(ToDecodeSide)
