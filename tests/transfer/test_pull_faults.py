"""Random histories of leases, pulls, faults and restarts: no wrong block is accepted, and no READ
writes to a block that it does not own.
"""

import random
from collections import Counter

import pytest
import torch

from pdlaunch.protocol.transfer import CancelPull, EndLease, PullDrained, PullFinished
from pdlaunch.transfer.proof import LATE, UNPROVEN
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, pull

NUM_BLOCKS = 16
PULL_BLOCKS = 2
NUM_STEPS = 600


class History:
    """One prefill rank that may restart, one decode rank, and a model of the owner of each block on
    both sides.
    """

    WEIGHTS = {
        "turn": 30,
        "grant": 10,
        "start": 10,
        "land": 4,
        "stall": 2,
        "calm": 3,
        "fail": 0.5,
        "cancel": 1,
        "end_lease": 1,
        "corrupt": 1.5,
        "pause": 1.5,
        "mute": 0.5,
        "restart": 0.4,
    }

    def __init__(self, seed: int, *, verify: bool = True) -> None:
        """Without ``verify``, no bytes change during a lease, since nothing would detect that."""
        self.random = random.Random(seed)
        self.world = World(verify=verify)
        self.world.pull_with(pull_timeout_s=8.0, pull_attempts=self.random.randint(1, 3))
        self.weights = {
            action: weight
            for action, weight in self.WEIGHTS.items()
            if verify or action != "corrupt"
        }
        self.seen: Counter[str] = Counter()
        self.incarnation = 0
        self.num_named = 0
        # Contents of a request's blocks when its lease was granted.
        self.expected: dict[str, torch.Tensor] = {}
        self.leased: dict[str, list[int]] = {}
        self.pulls: dict[str, tuple[str, list[int]]] = {}
        self.quarantined: dict[str, list[int]] = {}
        self.restart()

    @property
    def holder(self) -> HolderRank:
        return self.world.holders[f"fake://{self.incarnation}"]

    def run(self) -> None:
        for action in self.random.choices(
            list(self.weights), list(self.weights.values()), k=NUM_STEPS
        ):
            getattr(self, action)()
            self.keep_the_books()
        self.end()

    def free(self) -> list[int]:
        """Blocks of the decode rank that the engine may use for anything."""
        running = [block_ids for _, block_ids in self.pulls.values()]
        owned = {
            block_id
            for block_ids in [*running, *self.quarantined.values()]
            for block_id in block_ids
        }
        return sorted(set(range(NUM_BLOCKS)) - owned)

    def name(self, kind: str) -> str:
        self.num_named += 1
        return f"{kind}{self.num_named}"

    def restart(self) -> None:
        self.world.fabric.kill()
        self.incarnation += 1
        self.leased.clear()
        self.world.peers.update([self.world.add(incarnation=self.incarnation).entry()])

    def grant(self) -> None:
        leased = {block_id for block_ids in self.leased.values() for block_id in block_ids}
        free = sorted(set(range(NUM_BLOCKS)) - leased)
        if len(free) < PULL_BLOCKS:
            return
        lease_id, block_ids = self.name("r"), self.random.sample(free, PULL_BLOCKS)
        self.holder.kv_cache[block_ids] = torch.full_like(
            self.holder.kv_cache[block_ids], self.num_named
        )
        self.leased[lease_id] = block_ids
        self.expected[lease_id] = self.holder.kv_cache[block_ids].clone()
        self.holder.holder.grant(grant(lease_id, block_ids, lease_s=5.0))

    def start(self) -> None:
        free = self.free()
        if len(free) < PULL_BLOCKS or not self.leased:
            return
        pull_id, block_ids = self.name("p"), self.random.sample(free, PULL_BLOCKS)
        lease_id = self.random.choice(list(self.leased))
        self.pulls[pull_id] = lease_id, block_ids
        self.world.pulls.start(pull(pull_id, self.holder.remote(lease_id), block_ids))

    def cancel(self) -> None:
        if self.pulls:
            self.world.pulls.cancel(CancelPull(pull_id=self.random.choice(list(self.pulls))))

    def end_lease(self) -> None:
        if self.leased:
            self.holder.holder.execute(EndLease(lease_id=self.random.choice(list(self.leased))))

    def corrupt(self) -> None:
        if self.leased:
            block_id = self.random.choice(self.random.choice(list(self.leased.values())))
            self.holder.kv_cache[block_id].view(-1)[self.random.randrange(384)] += 1

    def stall(self) -> None:
        self.world.fabric.stalled = True

    def fail(self) -> None:
        self.world.fabric.failing = True

    def mute(self) -> None:
        for channel in self.holder.channels:
            channel.mute = True

    def calm(self) -> None:
        self.world.fabric.stalled = self.world.fabric.failing = False
        for channel in self.holder.channels:
            channel.mute = False

    def land(self) -> None:
        """Let stalled READs write; check that they change only blocks that a transfer owns."""
        free = self.free()
        before = self.world.kv_cache[free].clone()
        self.world.fabric.land()
        assert torch.equal(self.world.kv_cache[free], before)

    def turn(self) -> None:
        """Take turns; check that nothing writes to blocks that no transfer owns."""
        self.world.clock.now += self.random.random() / 4
        free = self.free()
        before = self.world.kv_cache[free].clone()
        self.world.turn(self.random.randint(1, 2))
        assert torch.equal(self.world.kv_cache[free], before)

    def pause(self) -> None:
        """Wait longer than a lease lasts without a heartbeat."""
        self.world.clock.now += 6.0

    def keep_the_books(self) -> None:
        for ended in self.holder.ended():
            # The engine uses the blocks for another request at once.
            self.holder.kv_cache[self.leased.pop(ended.lease_id)] = -1.0
            self.seen[ended.reason] += 1
        events = self.world.events[:]
        self.world.events.clear()
        for event in events:
            match event:
                case PullFinished():
                    self.finish(event)
                case PullDrained():
                    del self.quarantined[event.pull_id]
                    self.seen["drained"] += 1

    def finish(self, event: PullFinished) -> None:
        lease_id, block_ids = self.pulls.pop(event.pull_id)
        if event.ok:
            assert not event.in_flight
            assert torch.equal(self.world.kv_cache[block_ids], self.expected[lease_id])
        elif event.in_flight:
            self.quarantined[event.pull_id] = block_ids
        self.seen["ok" if event.ok else "failed"] += 1
        self.seen["unproven"] += event.counts.get(UNPROVEN, 0)
        self.seen["late"] += event.counts.get(LATE, 0)

    def end(self) -> None:
        """Stop all faults; check that everything ends and nothing is left."""
        self.calm()
        for _ in range(4):
            self.land()
            self.pause()
            self.world.clock.now += 10
            self.turn()
            self.keep_the_books()
        assert self.pulls == {}
        assert self.quarantined == {}
        assert len(self.world.pulls) == 0
        assert self.holder.holder.is_idle
        assert all(read.released for read in self.world.fabric.reads)
        assert len(self.world.connector.peers) <= 1
        self.world.close()


OUTCOMES = ("ok", "failed", "late", "drained", "pulled", "expired", "released")


def what_happens(first_seed: int, *, verify: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 5):
        history = History(seed, verify=verify)
        history.run()
        seen += history.seen
    return seen


@pytest.mark.parametrize("first_seed", range(0, 20, 5))
def test_faults(first_seed):
    seen = what_happens(first_seed, verify=True)
    # Histories without these outcomes would prove nothing.
    assert all(seen[outcome] > 5 for outcome in (*OUTCOMES, "unproven")), seen


@pytest.mark.parametrize("first_seed", range(100, 120, 5))
def test_the_seconds_of_leases_alone_keep_out_blocks_that_were_used_again(first_seed):
    """There are no checksums, and the puller does not ask the holder at the end."""
    seen = what_happens(first_seed, verify=False)
    assert all(seen[outcome] > 5 for outcome in OUTCOMES), seen
