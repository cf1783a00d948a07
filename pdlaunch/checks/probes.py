"""Looks at ports, weights, executables and packages."""

from __future__ import annotations

from pdlaunch.checks.probed import Probes
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.roles import Role
from pdlaunch.machine.availability import PortState, probe_port
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.machine.host import missing_modules
from pdlaunch.planning.models import weight_error
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.vllm_engines import engine_command_on

EXTRAS = {
    "gguf": ("gguf", "accelerate"),
    "cuda": ("cuda.bindings",),
    "mooncake": ("mooncake",),
}
"""Modules of the extras that settings or a model can ask for."""


def probe_files(resolved: ResolvedLaunch) -> Probes:
    """Look at the files of weights and executables, and for the packages of extras."""
    weight_errors = {
        role: error
        for role, engines in resolved.roles.items()
        if engines.settings.load_format != "dummy"
        and (error := weight_error(engines.model)) is not None
    }
    return Probes(
        missing_extras=missing_modules(EXTRAS),
        weight_errors=weight_errors,
        engine_commands=_engine_commands(resolved),
    )


def probe_ports(resolved: ResolvedLaunch) -> dict[tuple[str, int], PortState]:
    """Look whether the ports of the launch on this host are free."""
    here = resolved.hosts[0].name
    return {
        (item.host, item.port): probe_port(item.host, item.port)
        for item in resolved.listeners
        if item.on in (here, LOCAL)
    }


def _engine_commands(resolved: ResolvedLaunch) -> dict[Role, dict[str, EngineCommand]]:
    found: dict[Role, dict[str, EngineCommand]] = {}
    for host in resolved.engine_hosts:
        for role, engines in resolved.by_host[host.name].items():
            command = engines.settings.engine_command
            if engines.is_native:
                continue
            told = engine_command_on(host, resolved.hosts[0], command, engines.given_environ)
            if told is not None:
                found.setdefault(role, {})[host.name] = told
    return found
