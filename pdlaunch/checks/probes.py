"""Looks at what rules judge beside the settings: ports, folders, files of weights, connectors of
other packages.
"""

from __future__ import annotations

import os

from pdlaunch.checks.context import Probes
from pdlaunch.config.connectors import ConnectorImportError, connector_spec
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import Role
from pdlaunch.machine.availability import probe_port, why_not_importable, why_not_writable
from pdlaunch.machine.engine_commands import (
    EngineCommand,
    EngineFlags,
    ask_engine_flags,
)
from pdlaunch.machine.facts import PortState
from pdlaunch.machine.host import missing_modules
from pdlaunch.planning.models import weight_error
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.vllm_verification import engine_command_on

EXTRAS = {
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "gguf": ("gguf", "accelerate"),
    "cuda": ("cuda.bindings",),
}
"""Modules of the extras that settings or a model can ask for."""


def probe_files(resolved: ResolvedLaunch) -> Probes:
    """Look at the files of weights, at the folders that must be writable, at the connector, and for
    the packages of extras.
    """
    folders = resolved.config.kv_transfer.folders
    problems = {name: why_not_writable(folder) for name, folder in folders.items()}
    weight_errors = {
        role: error
        for role, engines in resolved.roles.items()
        if engines.settings.load_format != "dummy"
        and (error := weight_error(engines.model)) is not None
    }
    return Probes(
        connector_errors=_connector_errors(resolved.config),
        missing_extras=missing_modules(EXTRAS),
        folder_problems={name: text for name, text in problems.items() if text is not None},
        weight_errors=weight_errors,
        engine_commands=_engine_commands(resolved),
    )


def probe_engine_flags(resolved: ResolvedLaunch) -> dict[Role, EngineFlags]:
    """Ask the executables of engines that are not native for their flags; takes them a while.

    Those of other hosts are not asked.
    """
    here = resolved.hosts[0].name
    answers: dict[tuple[str, frozenset[tuple[str, str]]], EngineFlags] = {}
    flags: dict[Role, EngineFlags] = {}
    for role, engines in resolved.roles.items():
        if engines.is_native or role not in resolved.placed.by_host.get(here, {}):
            continue
        command, environ = engines.settings.engine_command, engines.given_environ
        key = (command, frozenset(environ.items()))
        if key not in answers:
            answers[key] = ask_engine_flags(command, environ)
        flags[role] = answers[key]
    return flags


def probe_ports(resolved: ResolvedLaunch) -> dict[tuple[str, int], PortState] | None:
    """Look whether the ports of the launch on this host are free.

    Returns None when a host's name could not be resolved in time.
    """
    here = resolved.hosts[0].name
    states = {
        (item.host, item.port): probe_port(item.host, item.port)
        for item in resolved.listeners
        if item.on in (here, LOCAL)
    }
    known = {address: state for address, state in states.items() if state is not None}
    return known if len(known) == len(states) else None


def _engine_commands(resolved: ResolvedLaunch) -> dict[Role, dict[str, EngineCommand]]:
    """Return what is known of the executables of engines that are not native, by host."""
    found: dict[Role, dict[str, EngineCommand]] = {}
    for host in resolved.engine_hosts:
        for role, engines in resolved.placed.by_host[host.name].items():
            command = engines.settings.engine_command
            if engines.is_native:
                continue
            told = engine_command_on(host, resolved.hosts[0], command, engines.given_environ)
            if told is not None:
                found.setdefault(role, {})[host.name] = told
    return found


def _connector_errors(config: LaunchConfig) -> dict[str, str]:
    """Return by name why a connector in use that is not pdlaunch's own cannot be imported."""
    errors: dict[str, str] = {}
    for name in {config.kv_transfer.connector, config.kv_transfer.carrier}:
        try:
            factory = connector_spec(name).factory
        except ConnectorImportError as error:
            errors[name] = str(error)
            continue
        if not factory.startswith("pdlaunch.") and (why := why_not_importable(factory, os.environ)):
            errors[name] = f"connector {name} cannot be imported from {factory}: {why}"
    return errors
