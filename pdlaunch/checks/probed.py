"""Looks at ports, weights, executables and packages, and holds what was probed beside the settings:
also measured pairs, and engines that run already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.roles import Role
from pdlaunch.errors import ConfigError
from pdlaunch.machine.availability import probe_port
from pdlaunch.machine.engine_commands import EngineCommand, find_engine_command
from pdlaunch.machine.host import missing_modules
from pdlaunch.planning.models import weight_error
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import Allocator

Link = Literal["hosts", "GPUs of a host", "CPUs of a host"]
# What links between two ranks should give
LINK_GIGABYTES_PER_S: Mapping[Link, float] = {
    # RDMA at 50 Gbit/s. A tenth is half of what 10 Gbit Ethernet carries.
    "hosts": 6.0,
    # PCIe 4.0 x16 carries 25 GB/s, NVLink 300 and more, a GPU to itself 1,000. A tenth is under
    # the first, and over what NIXL gives in pieces of 32 KiB.
    "GPUs of a host": 100.0,
    # A loaded machine reached 0.3 to 0.8 GB/s, a quiet one 2 to 3.4.
    "CPUs of a host": 1.0,
}


def is_slow(gigabytes_per_s: float | None, link: Link) -> bool:
    """Return True below a tenth of what the link should give; False where nothing is known."""
    return gigabytes_per_s is not None and gigabytes_per_s < LINK_GIGABYTES_PER_S[link] / 10


@dataclass(frozen=True, slots=True)
class PairTransport:
    """Says how fast one decode rank reads from one prefill rank."""

    decode_rank: str  # ``decode-0/rank-0``
    prefill_rank: str
    path: str  # the path in use: ``nixl/UCX``, ``p2p/memfd`` and such
    allocator: Allocator  # allocator of the prefill rank's KV cache
    gigabytes_per_s: float | None = None  # None: too few bytes moved to tell
    # Names of the two hosts, prefill's first; None: both ranks are on one
    hosts: tuple[str, str] | None = None
    shares_gpu: bool = False
    piece_bytes: int = 0  # size of the pieces that it was measured with; 0: not known
    # Speed of the paths that are not in use, or why they cannot be
    other_paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def link(self) -> Link:
        if self.hosts is not None:
            return "hosts"
        return "CPUs of a host" if self.allocator == "host" else "GPUs of a host"


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
    piece_bytes: int = 0  # mean size of the pieces of its READs; 0: not known
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
    # Decode has told that it did not compute the canary; else these bytes are all that is known,
    # and other requests may have read them
    is_told: bool = True
    seconds: float = 0.0
    transport: str = ""  # of UCX; empty: not known
    wrong_address: str = ""  # the reason why decode cannot find the side channel there


@dataclass(frozen=True, slots=True)
class SeenDeployment:
    """Holds the engines and pairs of a deployment that runs already."""

    engines: tuple[SeenEngine, ...]
    pairs: tuple[SeenPair, ...] | None  # none: no canary was sent
    # By name of a pair, from pdlaunch routers: path with speed, and why the pair is slow
    told_pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def of(self, role: Role) -> tuple[SeenEngine, ...]:
        """Return the engines of a role that answer."""
        return tuple(each for each in self.engines if each.role == role and not each.problem)


@dataclass(frozen=True, slots=True)
class Probes:
    """Holds what was probed for one check; None where nobody looked."""

    # Why an address cannot be listened on, by host and port; empty: it can
    ports: Mapping[tuple[str, int], str] | None = None
    # Maps an extra of pdlaunch to the first of its modules that this Python does not find
    missing_extras: Mapping[str, str] | None = None
    weight_errors: Mapping[Role, ConfigError] | None = None
    # Facts about the executables of vLLM engines, by host, found without running them
    engine_commands: Mapping[Role, Mapping[str, EngineCommand]] | None = None
    deployment: SeenDeployment | None = None
    # Every pair of ranks of a launch that was measured
    transport: tuple[PairTransport, ...] | None = None


# Modules of the extras that settings or a model can ask for
EXTRAS = {
    "gguf": ("gguf", "accelerate"),
    "cuda": ("cuda.bindings",),
    "mooncake": ("mooncake",),
}


def probe_launch(resolved: ResolvedLaunch, *, with_ports: bool = True) -> Probes:
    """Look at weights, executables and ports on this host, and for the packages of extras."""
    weight_errors = {
        role: error
        for role, engines in resolved.roles.items()
        if engines.settings.load_format != "dummy"
        and (error := weight_error(engines.model)) is not None
    }
    here = (resolved.hosts[0].name, LOCAL)
    ports = {
        (item.host, item.port): probe_port(item.host, item.port)
        for item in (resolved.listeners if with_ports else ())
        if item.on in here
    }
    return Probes(
        ports=ports if with_ports else None,
        missing_extras=missing_modules(EXTRAS),
        weight_errors=weight_errors,
        engine_commands=_engine_commands(resolved),
    )


def _engine_commands(resolved: ResolvedLaunch) -> dict[Role, dict[str, EngineCommand]]:
    """Return what is known of executables by role and host; agents tell those that they allow."""
    found: dict[Role, dict[str, EngineCommand]] = {}
    for host in resolved.engine_hosts:
        for role, engines in resolved.by_host[host.name].items():
            command = engines.settings.engine_command
            if engines.is_native:
                continue
            if host.name == resolved.hosts[0].name:
                told = find_engine_command(command, engines.given_environ)
            elif host.executables is not None:
                name = PurePath(command).name
                problem = f"its agent does not allow it: start that with --allow-executable {name}"
                told = host.executables.get(name, EngineCommand(problem=problem))
            else:
                continue
            found.setdefault(role, {})[host.name] = told
    return found
