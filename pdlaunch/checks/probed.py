"""Holds what was probed beside the settings: measured pairs, and engines that run already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdlaunch.config.roles import Role
from pdlaunch.errors import ConfigError
from pdlaunch.machine.availability import PortState
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.planning.role_engines import Allocator


@dataclass(frozen=True, slots=True)
class PairTransport:
    """Says how fast one decode rank reads from one prefill rank."""

    decode_rank: str  # ``decode-0/rank-0``
    prefill_rank: str
    path: str  # the path in use: ``nixl/UCX``, ``p2p/memfd`` and such
    allocator: Allocator  # allocator of the prefill rank's KV cache
    gigabytes_per_s: float | None = None
    """None: too few bytes moved to tell."""
    hosts: tuple[str, str] | None = None
    """Names of the two hosts, prefill's first; None: both ranks are on one."""
    other_paths: Mapping[str, str] = field(default_factory=dict)
    """Speed of the paths that are not in use, or why they cannot be."""


@dataclass(frozen=True, slots=True)
class SeenEngine:
    """Says what an engine that runs already answers over HTTP; None where it does not say."""

    role: Role
    url: str
    kind: str = "vllm"
    problem: str = ""  # the reason why it cannot be asked; nothing else is known then
    version: str | None = None
    models: tuple[str, ...] = ()
    max_model_len: int | None = None
    block_size: str | None = None
    cache_dtype: str | None = None
    # Counts since its start.
    prompt_tokens: int = 0
    bytes_read: int = 0
    num_expired: int = 0  # leases that ended before their blocks were read
    num_failed: int = 0  # transfers and notifications that failed
    num_answers: int = 0  # of vLLM alone, as are their tokens
    answer_tokens: int = 0
    gigabytes_per_s: float | None = None  # mean speed of its READs; None: too few bytes to tell
    has_dev_mode: bool = False

    @property
    def name(self) -> str:
        return f"{self.role} {self.url}"


@dataclass(frozen=True, slots=True)
class SeenPair:
    """Says what became of a canary through a pair of engines that run already."""

    prefill: str
    decode: str  # URLs
    problem: str = ""  # the reason why the canary failed; empty: it came through
    num_bytes: int = 0
    is_told: bool = True
    """Decode has told that it did not compute the canary; else these bytes are all that is known,
    and other requests may have read them.
    """
    seconds: float = 0.0
    wrong_address: str = ""  # the reason why decode cannot find the side channel there


@dataclass(frozen=True, slots=True)
class SeenDeployment:
    """Holds the engines and pairs of a deployment that runs already."""

    engines: tuple[SeenEngine, ...]
    pairs: tuple[SeenPair, ...] | None  # none: no canary was sent

    def of(self, role: Role) -> tuple[SeenEngine, ...]:
        """Return the engines of a role that answer."""
        return tuple(each for each in self.engines if each.role == role and not each.problem)


@dataclass(frozen=True, slots=True)
class Probes:
    """Holds what was probed for one check; None where nobody looked."""

    ports: Mapping[tuple[str, int], PortState] | None = None
    missing_extras: Mapping[str, str] | None = None
    """Maps an extra of pdlaunch to the first of its modules that this Python does not find."""
    weight_errors: Mapping[Role, ConfigError] | None = None
    engine_commands: Mapping[Role, Mapping[str, EngineCommand]] | None = None
    """Facts about the executables of vLLM engines, by host, found without running them."""
    deployment: SeenDeployment | None = None
    transport: tuple[PairTransport, ...] | None = None
    """Every pair of ranks of a launch that was measured."""
