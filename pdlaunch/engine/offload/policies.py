"""Eviction policies choose which host chunk to give up first. A policy orders keys; the tier says
which of them may go.

``LRU`` gives up what was unused for longest: a few long documents that nobody asks for again push
out everything. ``ARC`` keeps apart what was used once and what was used more often, and learns from
its own mistakes how much room each deserves.

Hit rates of ``python -m tests.engine.offload.policy_trace`` (multi-turn chats; 4,000 blocks),
which also knows S3-FIFO, 2Q, SLRU and SIEVE; ARC is the only one that loses next to nothing to LRU
where there is no scan::

                        lru     arc     s3-fifo
    chats only          58.8%   58.0%   52.9%
    10 % documents      30.5%   39.4%   36.3%
    30 % documents       8.4%   18.2%   15.8%
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class EvictionPolicy(ABC, Generic[Key]):
    """Orders the keys of a cache by who leaves first. Every key is added once and leaves by
    ``evict`` or ``remove``.
    """

    @abstractmethod
    def add(self, key: Key) -> None:
        """Take in a key."""

    @abstractmethod
    def touch(self, key: Key) -> None:
        """Note that a key was used."""

    @abstractmethod
    def remove(self, key: Key) -> None:
        """Let a key go for another reason than want of room."""

    @abstractmethod
    def evict(self, may_leave: Callable[[Key], bool]) -> Key | None:
        """Choose a key and forget it; None when none may leave."""

    @abstractmethod
    def __iter__(self) -> Iterator[Key]: ...

    @abstractmethod
    def __len__(self) -> int: ...


class LRU(EvictionPolicy[Key]):
    """Lets the least recently used one leave first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        self._keys[key] = None

    def touch(self, key: Key) -> None:
        self._keys.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self._keys[key]

    def evict(self, may_leave: Callable[[Key], bool]) -> Key | None:
        for key in self._keys:
            if may_leave(key):
                del self._keys[key]
                return key
        return None

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class ARC(EvictionPolicy[Key]):
    """Implements the adaptive replacement cache. Source: Megiddo and Modha, FAST 2003.

    once    keys not used since they came        gone_once    keys that left it lately, no content
    often   keys that were, or that came back    gone_often

    A key that comes back from ``gone_once`` says that ``once`` was too small, and the other way
    round: ``target`` follows.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._target = 0.0
        self._once: OrderedDict[Key, None] = OrderedDict()
        self._often: OrderedDict[Key, None] = OrderedDict()
        self._gone_once: OrderedDict[Key, None] = OrderedDict()
        self._gone_often: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        if key in self._gone_once:
            # It would still be here if ``once`` had been larger; the step is larger the rarer such
            # hits are.
            step = max(1.0, len(self._gone_often) / len(self._gone_once))
            self._target = min(float(self._capacity), self._target + step)
            del self._gone_once[key]
            self._often[key] = None
        elif key in self._gone_often:
            # The same for ``often``, at the cost of ``once``.
            step = max(1.0, len(self._gone_once) / len(self._gone_often))
            self._target = max(0.0, self._target - step)
            del self._gone_often[key]
            self._often[key] = None
        else:
            self._once[key] = None

    def touch(self, key: Key) -> None:
        self._once.pop(key, None)
        self._often[key] = None
        self._often.move_to_end(key)

    def remove(self, key: Key) -> None:
        queue = self._once if key in self._once else self._often
        del queue[key]

    def evict(self, may_leave: Callable[[Key], bool]) -> Key | None:
        queues = [(self._once, self._gone_once), (self._often, self._gone_often)]
        # ``once`` has no more than its share, so ``often`` gives a key up first.
        if len(self._once) <= self._target:
            queues.reverse()
        for queue, gone in queues:
            for key in queue:
                if may_leave(key):
                    del queue[key]
                    self._remember(gone, key)
                    return key
        return None

    def __iter__(self) -> Iterator[Key]:
        yield from self._once
        yield from self._often

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def _remember(self, gone: OrderedDict[Key, None], key: Key) -> None:
        gone[key] = None
        if len(gone) > self._capacity:
            gone.popitem(last=False)
