"""Each kind of question that a decode rank can put to a prefill rank."""

from __future__ import annotations

import torch

from pdlaunch.protocol.side_channel import (
    Handshake,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    Push,
    ToPrefillSide,
)
from pdlaunch.transfer.handshake import compatibility_of
from tests.transfer.fakes import layout_of, spec_of


def questions_for(engine_id: str) -> list[ToPrefillSide]:
    """One of each kind, about the lease ``kept``."""
    of_pull = {"engine_id": engine_id, "lease_id": "kept", "reader": "x"}
    compatibility = compatibility_of(
        spec_of("decode"),
        layout_of(),
        torch.float32,
        model_digest="digest",
        total_kv_heads=3,
        connector="nixl",
    )
    return [
        Handshake(
            call_id=1,
            engine_id="d" * 32,
            rank_name="decode-7/rank-5",
            incarnation=1,
            expected_engine_id=engine_id,
            compatibility=compatibility,
            agent_metadata=b"",
        ),
        PullBegin(call_id=2, num_decode_ranks=1, **of_pull),
        PullHeartbeat(call_id=3, **of_pull),
        PullEnd(call_id=4, **of_pull),
        Push(call_id=5, block_ids=[13], first_head=0, num_heads=1, target=b"", **of_pull),
    ]
