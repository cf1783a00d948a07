"""Holds what rules look at: a resolved launch, the origins of its settings, and what was probed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pdlaunch.checks.deployment import SeenDeployment
from pdlaunch.checks.nixl_answers import NixlAnswer, uses_ucx
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import Role
from pdlaunch.config.sources import Origin
from pdlaunch.errors import ConfigError
from pdlaunch.machine.engine_commands import EngineCommand, EngineFlags
from pdlaunch.machine.facts import Fact, Machine, PortState
from pdlaunch.planning.hosts import DeviceKind
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import Allocator, RoleEngines

Need = (
    Fact
    | Literal[
        "model",
        "model_files",
        "ports",
        "nixl",
        "connector",
        "extras",
        "folders",
        "weights",
        "transport",
        "engine_commands",
        "engine_flags",
        "deployment",
        "canary",
        "handshake",
    ]
)
"""Facts that can be missing."""

WITHOUT_PROBE: frozenset[Need] = frozenset({"nixl", "transport", "engine_flags"})
"""Facts that are missing without ``--probe``: transport, and another for each kind of engine."""

_NOT_PROBED: Mapping[str, tuple[Need, str]] = {
    "ports": ("ports", "ports were not probed on this machine"),
    "nixl": ("nixl", "NIXL is asked with --probe, and by serve where variables of UCX are set"),
    "connector_errors": ("connector", "the connector was not imported on this machine"),
    "missing_extras": ("extras", "packages were not looked for on this machine"),
    "folder_problems": ("folders", "folders were not probed on this machine"),
    "weight_errors": ("weights", "files of weights were not looked at"),
    "transport": ("transport", "serve measures it after the handshake"),
    "engine_commands": ("engine_commands", "executables were not looked at on this machine"),
    "deployment": ("deployment", "engines that run already are looked at by `pdlaunch doctor`"),
    "engine_flags": ("engine_flags", "executables of engines are asked with --probe"),
}
"""Names, for each field of ``Probes``, the fact and why it is missing where nobody looked."""


@dataclass(frozen=True, slots=True)
class PairTransport:
    """Says how fast one decode rank reads from one prefill rank."""

    decode_rank: str
    """``decode-0/rank-0``"""
    prefill_rank: str
    """``prefill-0/rank-0``"""
    path: str
    """The path in use: ``nixl/UCX``, ``p2p/memfd`` and such."""
    allocator: Allocator
    """Allocator of the prefill rank's KV cache."""
    gigabytes_per_s: float | None = None
    """None: too few bytes moved to tell, or nothing could be moved."""
    expected_gigabytes_per_s: float | None = None
    """Speed of a good path over the link between the two; None: not known."""
    hosts: tuple[str, str] | None = None
    """Names of the two hosts, prefill's first; None: both ranks are on one."""
    link: str = ""
    """The link, in words: ``18 NVLinks with 478 GB/s``."""
    error: str | None = None
    """The reason why nothing could be moved."""
    other_paths: Mapping[str, str] = field(default_factory=dict)
    """Speed of the paths that are not in use, or why they cannot be."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Holds what was probed for one check; None where nobody looked."""

    ports: Mapping[tuple[str, int], PortState] | None = None
    """Says for each host and port whether it can be listened on."""
    nixl: Mapping[Role, NixlAnswer] | None = None
    """NIXL's answer to the settings of each role's ranks."""
    connector_errors: Mapping[str, str] | None = None
    """Maps a name to the reason why that connector of another package that is in use cannot be
    imported.
    """
    missing_extras: Mapping[str, str] | None = None
    """Maps an extra of pdlaunch to the first of its modules that this Python does not find."""
    folder_problems: Mapping[str, str] | None = None
    """Reasons why folders cannot be written to, by setting."""
    weight_errors: Mapping[Role, ConfigError] | None = None
    """Reasons why the engines of a role cannot read their weights."""
    engine_commands: Mapping[Role, Mapping[str, EngineCommand]] | None = None
    """Facts about the executables of engines that are not native, by the host that they are on,
    found without running them.
    """
    engine_flags: Mapping[Role, EngineFlags] | None = None
    """The flags that these executables list in their help."""
    deployment: SeenDeployment | None = None
    """Engines that run already."""
    transport: tuple[PairTransport, ...] | None = None
    """Every pair of ranks of a launch that was measured."""


@dataclass(frozen=True, slots=True)
class Context:
    """Holds everything that a rule may look at."""

    launch: ResolvedLaunch
    origins: Mapping[str, Origin]
    probes: Probes
    missing: Mapping[Need, str]
    """Facts that are not known, and why."""

    @property
    def config(self) -> LaunchConfig:
        return self.launch.config

    @property
    def machine(self) -> Machine:
        """Return the machine that is judged; rules that need facts of machines judge each."""
        return self.launch.machine

    @property
    def engines(self) -> Mapping[Role, RoleEngines]:
        """Return the roles that have engines, on the machine that is judged where that is one of
        many.
        """
        return self.launch.roles

    def given(self, path: str) -> bool:
        """Return whether the user has set this, be it to its default."""
        origin = self.origins.get(path)
        return origin is not None and origin.kind not in ("default", "derived")

    def where_variable(self, engines: RoleEngines, name: str) -> str:
        """Return the setting that gives a variable to ranks, else the command's environment."""
        paths = (f"{engines.role}.env.{name}", f"env.{name}")
        return next((path for path in paths if self.given(path)), f"environment {name}")

    def engine_commands(self, role: Role) -> Mapping[str, EngineCommand]:
        """Return what is known of the executable of a role, by the hosts of its engines."""
        return (self.probes.engine_commands or {}).get(role, {})

    def on_host(self, name: str) -> str:
        """Return the words with which a message begins that is about one host of several."""
        return f"on {name}: " if self.launch.spans_hosts else ""

    def on(self, device: DeviceKind) -> Iterator[RoleEngines]:
        """Return the engines on this kind of device."""
        return (engines for engines in self.engines.values() if engines.device == device)

    def peers(self, device: DeviceKind | None = None) -> Iterator[RoleEngines]:
        """Return the engines that exchange KV blocks, those on this kind of device."""
        return (engines for engines in self.pair() or () if device in (None, engines.device))

    def pair(self) -> tuple[RoleEngines, RoleEngines] | None:
        """Return the prefill and the decode side, where there are both."""
        prefill, decode = self.launch.peers.get("prefill"), self.launch.peers.get("decode")
        return (prefill, decode) if prefill and decode else None

    def uses(self, connector: str) -> bool:
        """Return whether KV blocks go from prefill to decode over this connector."""
        return self.pair() is not None and self.config.kv_transfer.carrier == connector

    @property
    def uses_ucx(self) -> bool:
        """Return whether ranks load NIXL, whose UCX may move KV blocks; path p2p does without."""
        return uses_ucx(self.launch)

    @property
    def moves_over_ucx(self) -> bool:
        """Return whether UCX may move KV blocks, in pdlaunch's own ranks or in engines of vLLM."""
        return self.uses_ucx or any(not each.is_native for each in self.pair() or ())

    @property
    def moves_cumem_slowly(self) -> bool:
        """Return whether a library opens GPU memory by itself where CuMem pools export no fabric
        handles: it then copies them through the host.
        """
        transfer = self.config.kv_transfer
        return (
            self.pair() is not None
            and transfer.opens_device_memory
            and not transfer.maps_memory
            and any(gpu.has_fabric_handles is False for gpu in self.machine.gpus)
        )

    def shapes(self) -> Iterator[tuple[RoleEngines, ModelShape]]:
        """Return the engines whose model is known."""
        return (
            (engines, engines.shape)
            for engines in self.engines.values()
            if engines.shape is not None
        )


def make_context(launch: ResolvedLaunch, origins: Mapping[str, Origin], probes: Probes) -> Context:
    """Put together what the rules look at, and name what is not known."""
    missing: dict[Need, str] = {fact: reason for fact, reason in launch.machine.unknown.items()}  # noqa: C416
    for engines in launch.roles.values():
        if reason := engines.model.pending or engines.model.foreign:
            missing["model"] = reason
        if engines.model.elsewhere:
            missing["model_files"] = engines.model.pending
    for name, (need, reason) in _NOT_PROBED.items():
        if getattr(probes, name) is None:
            missing[need] = reason
    if probes.deployment is None or probes.deployment.pairs is None:
        missing["canary"] = "no canary was sent"
    if probes.deployment is None or not probes.deployment.has_asked_side_channels:
        missing["handshake"] = "side channels are asked with --handshake, after a canary"
    return Context(launch, origins, probes, missing)
