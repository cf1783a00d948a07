"""A peer is stopped in the middle of a pull, the request is cancelled, others are served, and then
the peer goes on.

A real scheduler owns the blocks, real ranks move them over NIXL: no block that anybody uses may
change.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.engine import AddRequest, SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.transfer import GrantLease, PullDrained, PullFinished, StartPull
from tests.transfer.fakes import layout_of, spec_of
from tests.transfer.rank_process import RankHandle

pytestmark = pytest.mark.processes

BLOCK_SIZE, NUM_BLOCKS = 16, 64
# 12 MiB: far more than sockets hold while their reader is stopped.
SHAPE = {"num_layers": 8, "head_dim": 64, "num_blocks": NUM_BLOCKS}
MODEL = "model"


def prompt_of(num_blocks: int, first_token: int) -> list[int]:
    """Fills ``num_blocks`` but for the few slots that the answer takes."""
    return [first_token + index % 50 for index in range(num_blocks * BLOCK_SIZE - 8)]


@dataclass
class DecodeEngine:
    """Steps of a scheduler whose rank runs in a process of its own; the test stands in for the
    model.
    """

    rank: RankHandle
    scheduler: Scheduler = field(init=False)
    # Blocks of each request that has entered the batch.
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = spec_of("decode").model_copy(update={"enable_prefix_caching": False})
        num_layers, head_dim = SHAPE["num_layers"], SHAPE["head_dim"]
        layout = layout_of(block_size=BLOCK_SIZE, num_layers=num_layers, head_dim=head_dim)
        requests = RequestLifecycle(
            spec,
            layout.groups,
            NUM_BLOCKS,
            model_digest=MODEL,
            engine_id="b" * 32,
            port=1,
        )
        self.scheduler = Scheduler(requests)
        self._lease_ids: dict[int, str] = {}

    def add(self, lease_id: str, prompt: list[int], holder: RankHandle | None = None) -> None:
        remote = (
            None
            if holder is None
            else msgspec.structs.replace(holder.remote(lease_id), num_tokens=len(prompt))
        )
        sampling = SamplingParams(max_tokens=8)
        self.scheduler.requests.add(
            AddRequest(
                request_id=lease_id, prompt_token_ids=prompt, sampling=sampling, remote_kv=remote
            )
        )

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        if plan.commands:
            self.rank.submit(*plan.commands)
        self._lease_ids |= {row.row: row.request_id for row in plan.new_rows}
        for blocks in plan.new_blocks:
            self.tables.setdefault(self._lease_ids[blocks.row], []).extend(blocks.block_ids)
        tokens = [TokenOutput(token_id=7) for row in plan.scheduled if row.sample]
        self.scheduler.postprocess(plan, tokens)
        self.scheduler.requests.check_integrity()
        return plan

    def hear(self, kind: type) -> PullFinished | PullDrained:
        event = self.rank.event(kind)
        self.scheduler.requests.on_transfer_event(event)
        self.scheduler.requests.check_integrity()
        return event


def lease(holder: RankHandle, lease_id: str, prompt: list[int], block_ids: list[int]) -> np.ndarray:
    """As if the holder had computed the prompt into these blocks; returns their bytes."""
    hashes = TokenHasher(root_hash(MODEL), BLOCK_SIZE).prompt_hashes(prompt, len(prompt))
    holder.submit(
        GrantLease(
            lease_id=lease_id,
            block_ids=[block_ids],
            first_block_index=[0],
            block_hashes=hashes,
            num_tokens=len(prompt),
            num_readers=1,
            lease_s=600.0,
        )
    )
    return holder.blocks(block_ids)


@pytest.fixture
def ranks(start: Callable[..., RankHandle]) -> list[RankHandle]:
    """Two prefill ranks and a decode rank whose READs need the holder to run (no CMA)."""
    options = {"transfer": {"nixl": {"path": "nixl"}}, **SHAPE}
    options["environment"] = (("UCX_TLS", "posix,self"),)
    first, second = (start("prefill", index=index, **options) for index in range(2))
    decode = start("decode", **options)
    assert {ready.path for ready in decode.connect(first, second)} == {"nixl/UCX"}
    return [first, second, decode]


def test_no_block_in_use_changes_when_a_stopped_peer_goes_on(ranks: list[RankHandle]) -> None:
    stopped, other, rank = ranks
    engine = DecodeEngine(rank)
    doomed, pulled, computed, late = (
        prompt_of(40, 3),
        prompt_of(12, 60),
        prompt_of(11, 120),
        prompt_of(30, 180),
    )
    sent = lease(stopped, "doomed", doomed, list(range(40))[::-1])

    # Stopped in the middle of the pull, which is cancelled.
    rank.call("interrupt", "stop", stopped.process.pid)
    engine.add("doomed", doomed, stopped)
    (start,) = engine.step().commands
    assert isinstance(start, StartPull)
    (destination,) = start.block_ids
    rank.wait("posted")
    engine.scheduler.requests.abort("doomed")
    engine.step()
    ended = engine.hear(PullFinished)
    assert (ended.ok, ended.error, ended.in_flight) == (False, "cancelled", True)
    assert engine.scheduler.requests.stats().num_quarantined_blocks == len(destination) == 40

    # Others are served from the other blocks, all but the one that is held back for who runs.
    wanted = lease(other, "pulled", pulled, list(range(20, 32)))
    engine.add("pulled", pulled, other)
    engine.step()
    assert engine.hear(PullFinished).ok
    engine.add("computed", computed)
    engine.step()
    for block_id in engine.tables["computed"]:
        rank.call("overwrite", block_id, float(block_id))
    in_use = engine.tables["pulled"] + engine.tables["computed"]
    assert len({*in_use, *destination}) == len(in_use) + len(destination) == NUM_BLOCKS - 1
    np.testing.assert_array_equal(rank.blocks(engine.tables["pulled"]), wanted)
    stats = engine.scheduler.requests.stats()
    assert (stats.num_running, stats.num_free_blocks, stats.num_quarantined_blocks) == (2, 1, 40)

    # Who needs more waits, rather than that it gets blocks which may still be written to.
    late_bytes = lease(other, "late", late, list(range(30)))
    engine.add("late", late, other)
    assert engine.step().commands == []
    stats = engine.scheduler.requests.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_for_kv) == (2, 1, 0)
    used = rank.blocks(in_use)
    assert not np.array_equal(rank.blocks(destination), sent), "the READ is in its middle"

    os.kill(stopped.process.pid, signal.SIGCONT)
    engine.hear(PullDrained)
    np.testing.assert_array_equal(rank.blocks(destination), sent)
    np.testing.assert_array_equal(rank.blocks(in_use), used)
    stats = engine.scheduler.requests.stats()
    assert (stats.num_quarantined_blocks, stats.num_free_blocks) == (0, 41)

    # Now they are anybody's.
    (start,) = engine.step().commands
    assert isinstance(start, StartPull)
    assert set(start.block_ids[0]) & set(destination)
    assert engine.hear(PullFinished).ok
    np.testing.assert_array_equal(rank.blocks(start.block_ids[0]), late_bytes)
    np.testing.assert_array_equal(rank.blocks(in_use), used)
