"""Hit rates of eviction policies on a synthetic multi-turn trace: ``python -m
tests.engine.offload.policy_trace``.

Chats come and go: each has one of a few system prompts, some turns with thinking time between them,
and sends its whole history each time. Now and then comes a document that is read once. Keys are
blocks; a prompt's hit is the longest prefix that is cached.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdlaunch.engine.offload.policies import ARC, LRU, EvictionPolicy

Block = tuple[int, int]
"""Origin (system prompt, chat or document) and index."""


@dataclass(frozen=True)
class TraceShape:
    num_requests: int = 4000
    num_chats_at_once: int = 60
    mean_turns: float = 6.0
    num_system_prompts: int = 8
    system_blocks: int = 20
    turn_blocks: tuple[int, int] = (4, 30)
    mean_think_requests: float = 60.0
    document_share: float = 0.1
    document_blocks: tuple[int, int] = (100, 600)


def make_trace(shape: TraceShape, seed: int) -> Iterator[list[Block]]:
    """Prompts, as blocks from the first on."""
    source = random.Random(seed)
    due: list[tuple[float, int]] = []
    prompts: dict[int, list[Block]] = {}
    num_origins = shape.num_system_prompts

    def start(now: float) -> None:
        nonlocal num_origins
        # Few system prompts are asked for most of the time.
        system = min(int(source.expovariate(0.6)), shape.num_system_prompts - 1)
        prompts[num_origins] = [(system, index) for index in range(shape.system_blocks)]
        heapq.heappush(due, (now + source.expovariate(1 / shape.mean_think_requests), num_origins))
        num_origins += 1

    for _ in range(shape.num_chats_at_once):
        start(0.0)
    for number in range(shape.num_requests):
        if source.random() < shape.document_share:
            origin, num_origins = num_origins, num_origins + 1
            yield [(origin, index) for index in range(source.randint(*shape.document_blocks))]
            continue
        now, chat = heapq.heappop(due)
        prompt = prompts[chat]
        prompt += [
            (chat, len(prompt) + index) for index in range(source.randint(*shape.turn_blocks))
        ]
        yield list(prompt)
        if source.random() < 1 / shape.mean_turns:
            del prompts[chat]
            start(max(now, float(number)))
        else:
            heapq.heappush(
                due,
                (max(now, float(number)) + source.expovariate(1 / shape.mean_think_requests), chat),
            )


def hit_rate(policy: EvictionPolicy[Block], capacity: int, trace: Iterator[list[Block]]) -> float:
    """Share of prompt blocks that are found, in prefixes without gaps."""
    cached: set[Block] = set()
    num_hits = num_blocks = 0
    for prompt in trace:
        num_blocks += len(prompt)
        length = next(
            (index for index, block in enumerate(prompt) if block not in cached), len(prompt)
        )
        num_hits += length
        needed = set(prompt)
        # From the end to the beginning: a block is of no use without those before it.
        for block in reversed(prompt):
            if block in cached:
                policy.touch(block)
                continue
            while len(cached) >= capacity:
                victim = policy.evict(lambda key, needed=needed: key not in needed)
                if victim is None:
                    break
                cached.remove(victim)
            if len(cached) < capacity:
                policy.add(block)
                cached.add(block)
    return num_hits / num_blocks


class Sieve(EvictionPolicy[Block]):
    """Candidate. Source: Zhang et al., SIEVE is simpler than LRU, NSDI 2024."""

    def __init__(self, _capacity: int) -> None:
        self._visited: OrderedDict[Block, bool] = OrderedDict()

    def add(self, key: Block) -> None:
        self._visited[key] = False

    def touch(self, key: Block) -> None:
        self._visited[key] = True

    def remove(self, key: Block) -> None:
        del self._visited[key]

    def evict(self, may_leave: Callable[[Block], bool]) -> Block | None:
        # The hand walks from old to new; what it has passed is behind it in this order, too.
        for _ in range(2 * len(self._visited)):
            key, visited = next(iter(self._visited.items()))
            if not visited and may_leave(key):
                del self._visited[key]
                return key
            self._visited[key] = False
            self._visited.move_to_end(key)
        return None

    def __iter__(self) -> Iterator[Block]:
        return iter(self._visited)

    def __len__(self) -> int:
        return len(self._visited)


class TwoQ(EvictionPolicy[Block]):
    """Candidate, full version. Source: Johnson and Shasha, 2Q, VLDB 1994."""

    def __init__(self, capacity: int) -> None:
        self._in_size, self._out_size = capacity // 4, capacity // 2
        self._new: OrderedDict[Block, None] = OrderedDict()
        self._out: OrderedDict[Block, None] = OrderedDict()
        self._main: OrderedDict[Block, None] = OrderedDict()

    def add(self, key: Block) -> None:
        if key in self._out:
            del self._out[key]
            self._main[key] = None
        else:
            self._new[key] = None

    def touch(self, key: Block) -> None:
        if key in self._main:
            self._main.move_to_end(key)

    def remove(self, key: Block) -> None:
        del (self._main if key in self._main else self._new)[key]

    def evict(self, may_leave: Callable[[Block], bool]) -> Block | None:
        queues = (
            [self._new, self._main] if len(self._new) > self._in_size else [self._main, self._new]
        )
        for queue in queues:
            for key in queue:
                if may_leave(key):
                    del queue[key]
                    if queue is self._new:
                        self._out[key] = None
                        if len(self._out) > self._out_size:
                            self._out.popitem(last=False)
                    return key
        return None

    def __iter__(self) -> Iterator[Block]:
        yield from self._new
        yield from self._main

    def __len__(self) -> int:
        return len(self._new) + len(self._main)


class SegmentedLRU(EvictionPolicy[Block]):
    """Candidate: a key that is used again is protected, in at most ``share`` of the capacity.
    Source: Karedla et al., 1994.
    """

    def __init__(self, capacity: int, share: float = 0.8) -> None:
        self._protected_size = int(capacity * share)
        self._trial: OrderedDict[Block, None] = OrderedDict()
        self._protected: OrderedDict[Block, None] = OrderedDict()

    def add(self, key: Block) -> None:
        self._trial[key] = None

    def touch(self, key: Block) -> None:
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        del self._trial[key]
        self._protected[key] = None
        if len(self._protected) > self._protected_size:
            demoted, _ = self._protected.popitem(last=False)
            self._trial[demoted] = None

    def remove(self, key: Block) -> None:
        del (self._protected if key in self._protected else self._trial)[key]

    def evict(self, may_leave: Callable[[Block], bool]) -> Block | None:
        for queue in (self._trial, self._protected):
            for key in queue:
                if may_leave(key):
                    del queue[key]
                    return key
        return None

    def __iter__(self) -> Iterator[Block]:
        yield from self._trial
        yield from self._protected

    def __len__(self) -> int:
        return len(self._trial) + len(self._protected)


class S3FIFO(EvictionPolicy[Block]):
    """Candidate: three queues; a key's count of uses is kept up to 3. Source: Yang et al., SOSP
    2023.

    small   new keys; at its end used keys go to main, others leave and are remembered in ghost
    main    at its end used keys go round again with one use less, others leave
    ghost   keys without content, as many as ``capacity``; one that comes back goes straight to main
    """

    _MOST_USES = 3

    def __init__(self, capacity: int, *, small_share: float = 0.1) -> None:
        self._small_size = max(1, int(capacity * small_share))
        self._ghost_size = capacity
        self._small: OrderedDict[Block, int] = OrderedDict()
        self._main: OrderedDict[Block, int] = OrderedDict()
        self._ghost: OrderedDict[Block, None] = OrderedDict()

    def add(self, key: Block) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: Block) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(self._MOST_USES, queue[key] + 1)

    def remove(self, key: Block) -> None:
        queue = self._small if key in self._small else self._main
        del queue[key]

    def evict(self, may_leave: Callable[[Block], bool]) -> Block | None:
        if len(self._small) > self._small_size:
            key = self._evict_small(may_leave)
            return key if key is not None else self._evict_main(may_leave)
        key = self._evict_main(may_leave)
        return key if key is not None else self._evict_small(may_leave)

    def __iter__(self) -> Iterator[Block]:
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _evict_small(self, may_leave: Callable[[Block], bool]) -> Block | None:
        for key in list(self._small):
            if self._small[key]:
                del self._small[key]
                self._main[key] = 0
            elif may_leave(key):
                del self._small[key]
                self._remember(key)
                return key
        return None

    def _evict_main(self, may_leave: Callable[[Block], bool]) -> Block | None:
        # Each round takes one use from every key, so that after the last one none is left.
        for _ in range(self._MOST_USES + 1):
            for key in list(self._main):
                if self._main[key]:
                    self._main[key] -= 1
                    self._main.move_to_end(key)
                elif may_leave(key):
                    del self._main[key]
                    return key
        return None

    def _remember(self, key: Block) -> None:
        self._ghost[key] = None
        if len(self._ghost) > self._ghost_size:
            self._ghost.popitem(last=False)


POLICIES: dict[str, Callable[[int], EvictionPolicy[Block]]] = {
    "lru": lambda _capacity: LRU(),
    "s3-fifo": S3FIFO,
    "slru": SegmentedLRU,
    "2q": TwoQ,
    "arc": ARC,
    "sieve": Sieve,
}
SHAPES = {
    "chats only": TraceShape(document_share=0.0),
    "10 % documents": TraceShape(document_share=0.1),
    "30 % documents": TraceShape(document_share=0.3),
}
CAPACITIES = (2000, 4000, 8000)


def main() -> None:
    for name, shape in SHAPES.items():
        best = hit_rate(LRU(), 10**9, make_trace(shape, 0))
        print(f"{name}: {best:.1%} with room for everything")  # noqa: T201
        for capacity in CAPACITIES:
            rates = {
                policy: hit_rate(make(capacity), capacity, make_trace(shape, 0))
                for policy, make in POLICIES.items()
            }
            line = "  ".join(f"{policy} {rate:.1%}" for policy, rate in rates.items())
            print(f"  {capacity:6} blocks: {line}")  # noqa: T201


if __name__ == "__main__":
    main()
