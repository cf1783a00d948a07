"""Each kind of question that a decode rank can put to a prefill rank."""

from __future__ import annotations

from pdlaunch.protocol.side_channel import (
    Handshake,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    Push,
    StateChecksums,
    ToPrefillSide,
)
from tests.transfer.fakes import layout_of
from tests.transfer.pull_world import compatibility


def questions_for(engine_id: str) -> list[ToPrefillSide]:
    """One of each kind, about the lease ``kept``."""
    of_pull = {"engine_id": engine_id, "lease_id": "kept", "reader": "x"}
    return [
        Handshake(
            call_id=1,
            engine_id="d" * 32,
            rank_name="decode-7/rank-5",
            incarnation=1,
            expected_engine_id=engine_id,
            compatibility=compatibility(layout_of(), "decode"),
            agent_metadata=b"",
        ),
        PullBegin(call_id=2, num_decode_ranks=1, **of_pull),
        PullHeartbeat(call_id=3, **of_pull),
        StateChecksums(call_id=4, **of_pull),
        PullEnd(call_id=5, **of_pull),
        Push(call_id=6, block_ids=[[13]], first_head=0, num_heads=1, target=b"", **of_pull),
    ]
