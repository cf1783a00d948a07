"""Messages of the side channel, on which a decode rank asks (DEALER) and a prefill rank answers
(ROUTER).

A pair shakes hands once for each incarnation. Each pull then sends ``PullBegin, StateChecksums,
PullHeartbeat*, PullEnd``. Seconds are remaining seconds, because clocks differ between hosts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pdlaunch.protocol.ids import EngineId, LeaseId, ReaderId
from pdlaunch.protocol.transfer import LeaseEnd
from pdlaunch.protocol.wire import Codec, Message

PROTOCOL_VERSION = 8

_IS_ID = msgspec.Meta(min_length=1, max_length=256)
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # a number of them, or an address
Seconds = Annotated[float, msgspec.Meta(ge=0)]  # excludes NaN, too: deadlines are computed from it


class Compatibility(Message, tag=False):
    """Holds what must be equal on both sides. Each field that differs is named with both values."""

    protocol_version: int
    pdlaunch_version: str
    # SHA-256 over the model's config, tensor names and shapes, and samples of the weights.
    model_digest: str
    dtype: str
    kv_dtype: str
    block_size: int
    groups: str  # layers and window of each KV cache group, in one line
    num_kv_heads: int  # of the whole model
    head_dim: int
    layout: str
    connector: str
    checksum: str  # algorithm name, or ``off``


class RegionPlace(msgspec.Struct, frozen=True, array_like=True):
    """Says that head h of block b lies at ``address + b * stride_bytes + h * head_bytes``."""

    address: Bytes
    stride_bytes: Bytes
    head_bytes: Bytes


class Geometry(Message, tag=False):
    regions: list[RegionPlace]
    num_blocks: NonNegative
    num_kv_heads: NonNegative  # KV heads of this rank
    first_kv_head: NonNegative  # global index of its first one
    device_index: NonNegative  # 0 on a CPU
    # Memory with a pattern that follows from the agent's name; peers read it to prove the path.
    scratch_address: Bytes = 0
    scratch_bytes: Bytes = 0
    memory_kind: Literal["DRAM", "VRAM"] = "DRAM"


class Handshake(Message):
    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]  # the decode engine's; tells apart its incarnations
    rank_name: Annotated[str, _IS_ID]
    incarnation: int
    # The value in the registry; the answer must carry the same.
    expected_engine_id: Annotated[EngineId, _IS_ID]
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


class LeaseQuestion(Message):
    call_id: int
    engine_id: Annotated[EngineId, _IS_ID]  # of the rank asked; another one answers Refused
    lease_id: Annotated[LeaseId, _IS_ID]
    reader: Annotated[ReaderId, _IS_ID]  # names the pull: unique over engines, ranks and choices


class PullBegin(LeaseQuestion):
    """Ask for the blocks of a lease, which extends it; again after a READ that failed."""

    num_decode_ranks: int  # ranks of the decode engine's TP group that pull from this rank


class GroupBlocks(Message, tag=False):
    # Logical index of the first block below; earlier ones have left the window.
    first_block_index: int
    block_ids: list[int]


class PullReply(Message):
    call_id: int
    num_tokens: int  # of the prompt
    # Chained token hashes of the prompt's blocks, the last one possibly partial; 32 bytes each.
    block_hashes: list[bytes]
    groups: list[GroupBlocks]
    lease_s: Seconds


class StateChecksums(LeaseQuestion):
    """Ask for the checksums of all blocks of a lease; the answer waits until they are computed."""


class ChecksumsReply(Message):
    call_id: int
    # For each KV cache group the checksums of each leased block and KV head of the rank asked,
    # 8 bytes each, little-endian.
    groups: list[bytes]


class PullHeartbeat(LeaseQuestion):
    """Extend the lease of a pull that is pending."""


class HeartbeatReply(Message):
    call_id: int
    lease_s: Seconds  # how long the lease holds from now on


class PullEnd(LeaseQuestion):
    """Ends the reader's use of a lease. It has no answer: the reader checks the time itself."""


class Push(LeaseQuestion):
    """Ask a rank that pushes to write blocks of a lease; its scratch without block ids."""

    lease_id: Annotated[LeaseId, msgspec.Meta(max_length=256)]
    reader: Annotated[ReaderId, msgspec.Meta(max_length=256)]
    block_ids: list[list[int]]  # blocks of the rank asked, by group
    first_head: int  # index within the rank asked
    num_heads: int
    target: bytes  # says where to write, in the connector's own encoding


class PushEnded(Message):
    """Tell that the write is over. ``ok``: every byte is in the reader's memory."""

    call_id: int
    ok: bool
    error: str = ""


class Refused(Message):
    """Refuse to answer: for the asker the pull or the handshake has failed."""

    call_id: int
    reason: str
    lease_end: LeaseEnd | None = None  # how the lease ended, which is no fault of the pair


ToPrefillSide = Handshake | PullBegin | StateChecksums | PullHeartbeat | PullEnd | Push
ToDecodeSide = HandshakeReply | PullReply | ChecksumsReply | HeartbeatReply | PushEnded | Refused

to_prefill_side: Codec[ToPrefillSide] = Codec(ToPrefillSide)
to_decode_side: Codec[ToDecodeSide] = Codec(ToDecodeSide)
