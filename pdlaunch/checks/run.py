"""Run the rules over a configuration: what ``check-config`` shows and ``serve`` refuses on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pdlaunch.checks.context import ROLES, Context, Engine, Listener, Model, Need
from pdlaunch.checks.models import read_models
from pdlaunch.checks.registry import all_rules
from pdlaunch.checks.resolved import resolved_values
from pdlaunch.checks.rule import Finding, Rule, Severity
from pdlaunch.checks.transport_report import TransportReport
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.field_types import set_paths
from pdlaunch.config.models import LaunchConfig, Role
from pdlaunch.config.sources import LoadedConfig, Origin
from pdlaunch.errors import ConfigError
from pdlaunch.platform.facts import Machine, PortState

SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True, slots=True)
class NotChecked:
    """A rule that could say nothing here."""

    rule: str
    title: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a check."""

    findings: tuple[Finding, ...]
    """Errors first, then warnings and infos; by code."""
    not_checked: tuple[NotChecked, ...]
    resolved: Mapping[str, Any]
    """What the configuration comes to; plain JSON values without secrets."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def is_ok(self, *, strict: bool = False) -> bool:
        """No errors; with ``strict`` no warnings either."""
        return not any(
            finding.severity == "error" or (strict and finding.severity == "warning")
            for finding in self.findings
        )


def run_checks(
    loaded: LoadedConfig,
    machine: Machine,
    environ: Mapping[str, str],
    *,
    models: Mapping[Role, Model] | None = None,
    ports: Mapping[tuple[str, int], PortState] | None = None,
    import_errors: Mapping[str, str] | None = None,
    folder_problems: Mapping[str, str] | None = None,
    weight_errors: Mapping[Role, ConfigError] | None = None,
    transport: TransportReport | None = None,
    family: str = "PD",
) -> Report:
    """Apply every rule whose code begins with ``family``.

    ``models``: read from disk when None. ``ports``, ``import_errors``, ``folder_problems``,
    ``weight_errors``, ``transport``: what was probed; rules that need what is None are listed as
    not checked. ``serve`` calls with ``family="PD5"`` and ``transport`` after the handshake.
    """
    context = build_context(
        loaded,
        machine,
        environ,
        models=read_models(loaded.config) if models is None else models,
        ports=ports,
        import_errors=import_errors,
        folder_problems=folder_problems,
        weight_errors=weight_errors,
        transport=transport,
    )
    rules = [rule for code, rule in all_rules().items() if code.startswith(family)]
    findings = [finding for rule in rules for finding in apply_rule(rule, context)]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    not_checked = [
        NotChecked(rule.code, rule.title, reason)
        for rule in rules
        if (reason := why_not(rule, context))
    ]
    return Report(tuple(findings), tuple(not_checked), resolved_values(context))


def apply_rule(rule: Rule, context: Context) -> list[Finding]:
    """What one rule finds; equal findings of both roles are one. Empty where it lacks a fact."""
    if why_not(rule, context):
        return []
    found = dict.fromkeys(rule.check(context))
    return [
        Finding(
            rule.code,
            rule.severity,
            item.where,
            item.message,
            item.fix or rule.fix,
            _origin(context, item.where),
        )
        for item in found
    ]


def why_not(rule: Rule, context: Context) -> str | None:
    """Why a rule can say nothing here."""
    return next((context.missing[need] for need in rule.needs if need in context.missing), None)


def listeners(config: LaunchConfig) -> tuple[Listener, ...]:
    """Addresses of the launch with a fixed port; engines without one choose free ones and register
    them.
    """
    engines = [
        Listener(f"server of {role}-{index}", ENGINE_HOST, port, f"{role}.port")
        for role in ROLES
        for index, port in enumerate(config.role(role).ports())
    ]
    return (Listener("router", config.host, config.port, "port"), *engines)


def build_context(
    loaded: LoadedConfig,
    machine: Machine,
    environ: Mapping[str, str],
    *,
    models: Mapping[Role, Model],
    ports: Mapping[tuple[str, int], PortState] | None = None,
    import_errors: Mapping[str, str] | None = None,
    folder_problems: Mapping[str, str] | None = None,
    weight_errors: Mapping[Role, ConfigError] | None = None,
    transport: TransportReport | None = None,
) -> Context:
    """Everything that the rules look at."""
    config = loaded.config
    engines = {
        role: _engine(config, role, machine, environ, models[role])
        for role in ROLES
        if config.role(role).replicas
    }
    missing: dict[Need, str] = {fact: reason for fact, reason in machine.unknown.items()}  # noqa: C416
    pending = [engine.model.pending for engine in engines.values() if engine.model.pending]
    if pending:
        missing["model"] = pending[0]
    if ports is None:
        missing["ports"] = "ports were not probed on this machine"
    if import_errors is None:
        missing["imports"] = "libraries are imported only with --probe"
    if folder_problems is None:
        missing["folders"] = "folders were not probed on this machine"
    if weight_errors is None:
        missing["weights"] = "files of weights were not looked at"
    if transport is None:
        missing["transport"] = "serve measures it after the handshake"
    return Context(
        config=config,
        origins=loaded.origins,
        machine=machine,
        environ=environ,
        engines=engines,
        listeners=listeners(config),
        ports=ports or {},
        import_errors=import_errors or {},
        folder_problems=folder_problems or {},
        weight_errors=weight_errors or {},
        transport=transport,
        missing=missing,
    )


def _engine(
    config: LaunchConfig, role: Role, machine: Machine, environ: Mapping[str, str], model: Model
) -> Engine:
    section, settings = config.role(role), config.engine_settings(role)
    wanted = settings.device
    return Engine(
        role=role,
        replicas=section.replicas,
        tp_size=section.tensor_parallel_size,
        settings=settings,
        overrides=frozenset(set_paths(section)),
        device=wanted if wanted != "auto" else "cuda" if machine.gpus else "cpu",
        has_native_bf16=machine.has_native_bf16,
        model=model,
        environ={**environ, **settings.env},
    )


def _origin(context: Context, where: str) -> str:
    origin = context.origins.get(where, Origin("default"))
    return origin.detail if origin.kind in ("flag", "environment", "file") else ""
