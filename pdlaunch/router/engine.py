"""Describes an engine as the router sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.ids import EngineId, LeaseId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.openai.responses import ModelCard

Processes = tuple[int, ...]
"""Incarnations of an engine's server and ranks."""
EngineKey = tuple[str, Processes, int]
"""Name, processes, and how often these got ready.

A restart makes it another engine, and so does its return from sleep or a stall.
"""


class Lender(msgspec.Struct, frozen=True, kw_only=True):
    """Tells where the leases of an engine are found: at its rank 0."""

    engine_id: EngineId
    host: str
    port: int
    tp_size: int

    def remote_kv(self, lease_id: LeaseId) -> RemoteKV:
        """Return the address of a lease that is not granted yet."""
        return RemoteKV(
            engine_id=self.engine_id,
            lease_id=lease_id,
            host=self.host,
            port=self.port,
            block_ids=[],
            num_tokens=0,
            tp_size=self.tp_size,
        )


class Engine(msgspec.Struct, kw_only=True, eq=False):
    """Counts the load of one engine; lives as long as the engine's processes do."""

    name: str
    processes: Processes
    url: str
    role: Role | None
    capabilities: Capabilities
    ready: bool
    state: str
    """``ready``, or the ``ListedState`` that says why not; for people."""
    reason: str = ""
    """The reason why it has ``failed``, and what comes next."""
    lender: Lender | None = None
    """None: it has no ranks of ours."""
    times_ready: int = 0
    max_model_len: int | None = None
    """Prompt plus output in tokens; None until the engine has been asked."""
    models: list[ModelCard] = []
    """What it has told of its models: the served one, and adapters."""
    num_prompt_tokens: int = 0
    """Estimated tokens of the prompts it is working on."""
    num_streams: int = 0
    num_works: int = 0
    """Pieces of work that are outstanding."""
    num_picks: int = 0
    num_failures: int = 0
    """Failures in a row."""
    avoid_until_at: float = 0.0
    """Instant on the pool's clock."""
    peers: frozenset[str] | None = None
    """The engines that it exchanges KV blocks with; None: all."""
    proofs: dict[str, int] = {}
    """Incarnations of the processes with which it has proven a path, by name."""

    @property
    def key(self) -> EngineKey:
        return (self.name, self.processes, self.times_ready)

    def may_pull_from(self, prefill: Engine) -> bool:
        """Tell whether it may be handed KV blocks of ``prefill``."""
        if self.peers is not None and prefill.name not in self.peers:
            return False
        return (
            not self.capabilities.needs_proof
            or self.proofs.get(prefill.name) == prefill.processes[0]
        )

    @contextlib.contextmanager
    def working(self, *, num_prompt_tokens: int = 0, num_streams: int = 0) -> Iterator[None]:
        """Count a piece of work as outstanding for as long as the block runs."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_streams += num_streams
        self.num_works += 1
        try:
            yield
        finally:
            self.num_prompt_tokens -= num_prompt_tokens
            self.num_streams -= num_streams
            self.num_works -= 1
