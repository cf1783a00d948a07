"""Defines rules and what they read. A rule is a row: fault, reason, place and fix.

::

    error("PD108", "block_size is not allowed by the attention backend of the device.",
        "Paged attention kernels on CUDA read the KV cache in tiles of 16 tokens.",
        over=Context.on_cuda, when=lambda each: each.settings.block_size % 16, at="block_size",
        message="block_size {0.settings.block_size} is not a multiple of 16, as CUDA needs",
        fix="Use a multiple of 16.", source="FlashAttention.", needs=("gpus",)),

``when`` is called with each item of ``over``, or with the whole context. It returns True for the
row's ``message``, in which ``{0}`` is the item (``{0}`` and ``{1}``: the two items of a pair);
another message; or one or several ``Found``. ``at`` is a setting (if the role overrides it, the
role's own setting is shown), a variable (``$UCX_TLS``), or any other name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from pdlaunch.checks.probed import Probes
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import Role
from pdlaunch.machine.facts import Fact, Machine
from pdlaunch.machine.host import EngineCommand
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
_FACTS: frozenset[str] = frozenset(get_args(Fact))
Pair = tuple[RoleEngines, RoleEngines]  # prefill, decode
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
    def pair(self) -> Pair | None:
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
        """Return True if the launch has a pair and uses this connector."""
        return self.pair is not None and self.kv_transfer.connector == connector

    @property
    def uses_ucx(self) -> bool:
        """Return True if pdlaunch's own ranks load NIXL and its UCX; path p2p needs neither."""
        is_native = all(each.is_native for each in self.engines.values())
        return is_native and self.uses("nixl") and self.kv_transfer.nixl.path != "p2p"

    # The items that rules judge: ``over=Context.on_cuda``

    def roles(self) -> Iterable[RoleEngines]:
        return self.engines.values()

    def on_cuda(self) -> list[RoleEngines]:
        return [each for each in self.engines.values() if each.device == "cuda"]

    def on_cpu(self) -> list[RoleEngines]:
        return [each for each in self.engines.values() if each.device == "cpu"]

    def shapes(self) -> list[tuple[RoleEngines, ModelShape]]:
        """Return the roles whose model is known, with its shape."""
        return [(each, each.shape) for each in self.engines.values() if each.shape is not None]

    def pairs(self) -> list[Pair]:
        return [self.pair] if self.pair else []

    def vllm_engines(self) -> list[RoleEngines]:
        return [each for each in self.engines.values() if not each.is_native]

    def vllm_pairs(self) -> list[Pair]:
        return [pair for pair in self.pairs() if not any(each.is_native for each in pair)]


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


@dataclass(frozen=True, slots=True)
class Found:
    """One finding of a rule; an empty field has the value in the rule's row."""

    message: str = ""
    at: str = ""
    fix: str | None = ""


# The result of ``when``: a false value for no finding, True, a message, or findings
Outcome = Found | Iterable[Found | str] | str | int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check, with all its texts."""

    rule: str
    severity: Severity
    # Dotted path of the setting to change, or the name of a variable, folder or package
    where: str
    message: str
    fix: str
    # Where the setting was given: ``deploy.yaml:3:5``, ``--port``, ``PDLAUNCH_PORT``. Empty for
    # defaults and facts of the machine.
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a deployment can fail."""

    severity: Severity
    code: str
    title: str  # a sentence that states the fault
    why: str
    fix: str  # empty: nothing to fix
    source: str  # where this is known from
    when: Callable[[Any], Outcome]
    over: Callable[[Context], Iterable[Any]] = lambda context: (context,)
    at: str = ""
    message: str = ""
    # Facts that the rule needs; if one is unknown, the rule is listed as not checked
    needs: tuple[Need, ...] = ()
    # The rule is not for engines of vLLM. Rules of the family PD6 are for no others.
    native_alone: bool = False

    @property
    def is_of_machine(self) -> bool:
        """Return True if the rule needs facts of a machine; it then judges each host alone."""
        return not _FACTS.isdisjoint(self.needs)

    def missing(self, context: Context) -> tuple[Need, ...]:
        """Return the unknown facts that the rule needs."""
        return tuple(need for need in self.needs if need in context.missing)

    def apply(self, context: Context) -> list[Finding]:
        if self.missing(context):
            return []
        # A setting of the top level is found once for each role. Keep the first finding.
        return list(dict.fromkeys(self._find(context)))

    def _find(self, context: Context) -> Iterator[Finding]:
        for item in self.over(context):
            for each in _found(self.when(item)):
                where = _place(context, item, each.at or self.at)
                items = item if isinstance(item, tuple) else (item,)
                message = each.message or self.message.format(*items)
                fix, origin = each.fix or self.fix, context.origins.get(where, "")
                yield Finding(self.code, self.severity, where, message, fix, origin)


def _found(outcome: Outcome) -> Iterable[Found]:
    match outcome:
        case None | int() | str():
            text = outcome if isinstance(outcome, str) else ""
            return (Found(text),) if outcome else ()
        case Found():
            return (outcome,)
        case _:
            return (Found(each) if isinstance(each, str) else each for each in outcome)


def _place(context: Context, item: object, at: str) -> str:
    match item:
        case RoleEngines():
            is_variable = at.startswith("$")
            return context.where_variable(item, at[1:]) if is_variable else item.where(at)
        case (RoleEngines() as prefill, RoleEngines() as decode):
            return differing_place(prefill, decode, at)
        case (RoleEngines() as engines, _):
            return _place(context, engines, at)
        case _:
            return at


def differing_place(prefill: RoleEngines, decode: RoleEngines, name: str) -> str:
    """Return the path of the setting that makes the two roles differ."""
    return decode.where(name) if name in decode.overrides else prefill.where(name)


error, warning, info = (partial(Rule, severity) for severity in SEVERITIES)
