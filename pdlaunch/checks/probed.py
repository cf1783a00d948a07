"""Probes facts for rules; declares them and those of measured pairs and running engines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.roles import Role
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import EngineCommand, find_engine_command, missing_modules
from pdlaunch.machine.network import probe_port
from pdlaunch.planning.models import weight_error
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import Allocator

Link = Literal["hosts", "GPUs of a host", "CPUs of a host"]
# Speed that a link between two ranks should have; a pair below a tenth of it is slow
LINK_GIGABYTES_PER_S: Mapping[Link, float] = {
    # RDMA at 50 Gbit/s. A tenth is half the speed of 10 Gbit Ethernet.
    "hosts": 6.0,
    # PCIe 4.0 x16 carries 25 GB/s, NVLink 300 and more, one GPU 1,000 within itself. A tenth is
    # below PCIe, and above the speed of NIXL with pieces of 32 KiB.
    "GPUs of a host": 100.0,
    # Measured: 0.3 to 0.8 GB/s on a loaded machine, 2 to 3.4 on a quiet one.
    "CPUs of a host": 1.0,
}


def is_slow(gigabytes_per_s: float | None, link: Link) -> bool:
    """Return True below a tenth of the link's proper speed; False if the speed is not known."""
    return gigabytes_per_s is not None and gigabytes_per_s < LINK_GIGABYTES_PER_S[link] / 10


@dataclass(frozen=True, slots=True)
class PairTransport:
    """How fast one decode rank reads from one prefill rank."""

    decode_rank: str  # ``decode-0/rank-0``
    prefill_rank: str
    path: str  # the path in use, such as ``nixl/UCX`` or ``p2p/memfd``
    allocator: Allocator  # allocator of the prefill rank's KV cache
    gigabytes_per_s: float | None = None  # None: too few bytes moved for a figure
    # Names of the two hosts, prefill's first; None: both ranks are on the same host
    hosts: tuple[str, str] | None = None
    shares_gpu: bool = False
    piece_bytes: int = 0  # size of the pieces in the measurement; 0: not known
    # Path that is not in use -> its speed, or why it cannot be used
    other_paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def link(self) -> Link:
        if self.hosts is not None:
            return "hosts"
        return "CPUs of a host" if self.allocator == "host" else "GPUs of a host"


@dataclass(frozen=True, slots=True)
class SeenEngine:
    """Facts that a running engine reports over HTTP; None where it does not report them."""

    role: Role
    url: str
    label: str = ""  # its name at the router that lists it
    kind: str = "vllm"
    problem: str = ""  # the reason why it does not answer; nothing else is known then
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
    num_answers: int = 0  # with ``answer_tokens``: only known for vLLM
    answer_tokens: int = 0
    gigabytes_per_s: float | None = None  # mean speed of its READs; None: too few bytes
    piece_bytes: int = 0  # mean size of the pieces of its READs; 0: not known
    has_dev_mode: bool = False

    @property
    def name(self) -> str:
        return self.label or f"{self.role} {self.url}"


@dataclass(frozen=True, slots=True)
class SeenPair:
    """The result of a canary through a pair of running engines."""

    prefill: str
    decode: str  # URLs
    name: str
    problem: str = ""  # the reason why the canary failed; empty: it came through
    num_bytes: int = 0
    # Decode has reported that it did not compute the canary. If False, only the bytes are known,
    # and other requests may have read them.
    is_reported: bool = True
    seconds: float = 0.0
    transport: str = ""  # of UCX; empty: not known
    wrong_address: str = ""  # why decode cannot reach the side channel at prefill's address


@dataclass(frozen=True, slots=True)
class SeenDeployment:
    """The engines and pairs of a running deployment."""

    engines: tuple[SeenEngine, ...]
    pairs: tuple[SeenPair, ...] | None  # None: no canary was sent
    # Name of a pair -> path with speed, and why the pair is slow; from routers of pdlaunch
    reported_pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def of(self, role: Role) -> tuple[SeenEngine, ...]:
        """Return the engines of a role that answer."""
        return tuple(each for each in self.engines if each.role == role and not each.problem)


@dataclass(frozen=True, slots=True)
class Probes:
    """The probed facts of one check; None if a fact was not probed."""

    # Host and port -> why the launch cannot listen there; empty: it can
    ports: Mapping[tuple[str, int], str] | None = None
    # Extra of pdlaunch -> the first of its modules that this Python does not have
    missing_extras: Mapping[str, str] | None = None
    weight_errors: Mapping[Role, ConfigError] | None = None
    # Role -> host -> facts about the executable of vLLM, found without running it
    engine_commands: Mapping[Role, Mapping[str, EngineCommand]] | None = None
    deployment: SeenDeployment | None = None
    # All measured pairs of ranks
    transport: tuple[PairTransport, ...] | None = None


# Extra that a setting or a model may need -> its modules
EXTRAS = {"gguf": ("gguf", "accelerate"), "cuda": ("cuda.bindings",), "mooncake": ("mooncake",)}


def probe_launch(resolved: ResolvedLaunch, *, with_ports: bool = True) -> Probes:
    """Probe weights, executables, ports and the packages of extras on this host."""
    weights = {
        role: weight_error(engines.model)
        for role, engines in resolved.roles.items()
        if engines.settings.load_format != "dummy"
    }
    here = (resolved.hosts[0].name, LOCAL)
    ports = {(it.host, it.port) for it in resolved.listeners if it.on in here}
    return Probes(
        ports={address: probe_port(*address) for address in ports} if with_ports else None,
        missing_extras=missing_modules(EXTRAS),
        weight_errors={role: error for role, error in weights.items() if error is not None},
        engine_commands=_engine_commands(resolved),
    )


def _engine_commands(resolved: ResolvedLaunch) -> dict[Role, dict[str, EngineCommand]]:
    """Return role -> host -> facts about its executable. Agents report the ones they allow."""
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
