"""Holds the input of rules: a resolved launch, the origins of its settings, and probed facts.

The functions below ``Context`` yield the items that a rule judges: ``over=engines``, ``over=pair``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pdlaunch.checks.probed import Probes
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import Role
from pdlaunch.machine.facts import Fact, Machine
from pdlaunch.machine.host import EngineCommand
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

# Facts that can be missing
Need = (
    Fact
    | Literal["model", "model_files", "ports", "extras", "weights"]
    | Literal["transport", "engine_commands", "deployment", "canary"]
)


# Field of ``Probes`` -> the fact that is missing if the field is None, and the reason
_NOT_PROBED: Mapping[str, tuple[Need, str]] = {
    "ports": ("ports", "ports were not probed on this machine"),
    "missing_extras": ("extras", "packages were not looked for on this machine"),
    "weight_errors": ("weights", "files of weights were not looked at"),
    "transport": ("transport", "serve measures it after the handshake"),
    "engine_commands": ("engine_commands", "executables were not looked at on this machine"),
    "deployment": ("deployment", "engines that run already are looked at by `pdlaunch doctor`"),
}


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that a rule may read."""

    launch: ResolvedLaunch
    origins: Mapping[str, str]
    probes: Probes
    missing: Mapping[Need, str]  # unknown fact -> the reason

    @property
    def config(self) -> LaunchConfig:
        return self.launch.config

    @property
    def kv_transfer(self) -> KVTransferSettings:
        return self.launch.config.kv_transfer

    @property
    def machine(self) -> Machine:
        return self.launch.machine

    @property
    def engines(self) -> Mapping[Role, RoleEngines]:
        return self.launch.roles

    @property
    def pair(self) -> tuple[RoleEngines, RoleEngines] | None:
        prefill, decode = self.launch.peers.get("prefill"), self.launch.peers.get("decode")
        return (prefill, decode) if prefill and decode else None

    def given(self, path: str) -> bool:
        return path in self.origins

    def where_variable(self, engines: RoleEngines, name: str) -> str:
        """Return the setting that defines a variable of ranks, else "environment NAME"."""
        paths = (f"{engines.role}.env.{name}", f"env.{name}")
        return next((path for path in paths if self.given(path)), f"environment {name}")

    def engine_commands(self, role: Role) -> Mapping[str, EngineCommand]:
        """Return host -> facts about the executable of a role's engines there."""
        return (self.probes.engine_commands or {}).get(role, {})

    def uses(self, connector: str) -> bool:
        """Return True if KV blocks go from prefill to decode over this connector."""
        return self.pair is not None and self.kv_transfer.connector == connector

    @property
    def uses_ucx(self) -> bool:
        """Return True if pdlaunch's own ranks load NIXL and its UCX; path p2p needs neither."""
        is_native = all(each.is_native for each in self.engines.values())
        return is_native and self.uses("nixl") and self.kv_transfer.nixl.path != "p2p"


def make_context(launch: ResolvedLaunch, origins: Mapping[str, str], probes: Probes) -> Context:
    """Make the context, with a reason for each unknown fact."""
    # A rule whose facts are unknown finds nothing: users would take a guess for a finding.
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
    return Context(launch, origins, probes, missing)


def cumem_setting(each: RoleEngines) -> str:
    """Return the setting that gives an engine CuMem pools; sleep mode does so too."""
    asked = each.settings.enable_cumem_allocator
    return "enable_cumem_allocator" if asked else "enable_sleep_mode"


def engines(context: Context) -> Iterator[RoleEngines]:
    """Yield the roles that have engines."""
    return iter(context.engines.values())


def on_cuda(context: Context) -> Iterator[RoleEngines]:
    """Yield the roles on GPUs."""
    return (each for each in context.engines.values() if each.device == "cuda")


def on_cpu(context: Context) -> Iterator[RoleEngines]:
    """Yield the roles on CPUs."""
    return (each for each in context.engines.values() if each.device == "cpu")


def shapes(context: Context) -> Iterator[tuple[RoleEngines, ModelShape]]:
    """Yield the roles whose model is known, with its shape."""
    return ((each, each.shape) for each in context.engines.values() if each.shape is not None)


def pair(context: Context) -> Iterator[tuple[RoleEngines, RoleEngines]]:
    """Yield the prefill and the decode side as one item."""
    if context.pair is not None:
        yield context.pair


def peers(context: Context) -> Iterator[RoleEngines]:
    """Yield the roles that exchange KV blocks."""
    return iter(context.pair or ())


def vllm_engines(context: Context) -> Iterator[RoleEngines]:
    """Yield the roles whose engines are of vLLM."""
    return (each for each in context.engines.values() if each.settings.engine == "vllm")


def vllm_pair(context: Context) -> Iterator[tuple[RoleEngines, RoleEngines]]:
    """Yield the prefill and the decode side as one item if both are of vLLM."""
    return (
        sides for sides in pair(context) if all(each.settings.engine == "vllm" for each in sides)
    )
