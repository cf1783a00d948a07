"""Looks at ports, folders, weights, executables and packages, and asks NIXL what it says."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

from pdlaunch.checks.context import uses_ucx
from pdlaunch.checks.probed import NixlAnswer, Probes
from pdlaunch.config.connectors import ConnectorImportError, connector_settings
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.machine.availability import (
    PortState,
    ProcessOutcome,
    probe_port,
    run_briefly,
    why_not_importable,
    why_not_writable,
)
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.machine.host import missing_modules
from pdlaunch.machine.network import is_address
from pdlaunch.planning.models import weight_error
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.vllm_engines import engine_command_on

EXTRAS = {
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "gguf": ("gguf", "accelerate"),
    "cuda": ("cuda.bindings",),
}
"""Modules of the extras that settings or a model can ask for."""

_NIXL_TIMEOUT_S = 60.0  # it takes 3 to 5 s on a quiet core
_TRIAL = "pdlaunch.transfer.connectors.nixl"
_ANSWER = re.compile(r"ok$|import: |refused: ")
_UCX_LINE = re.compile(r"\bUCX\s+(WARN|ERROR|FATAL)\s+(.*\S)")
_NIXL_LINE = re.compile(r"E\d{4} [\d:.]+ +\d+ \S+\] (.*\S)")
_WORTH_SAYING = re.compile(r"\b(is|are) not available\b|\(maybe: ")
"""UCX warnings to report. UCX suggests no similar name (``maybe:``) for variables of transports
that are not loaded, so such warnings are dropped."""
_OF_IMAGES = frozenset({"UCX_VERSION", "UCX_HOME", "UCX_ROOT", "UCX_DIR", "UCX_PATH"})
"""Variables of container images and module files, which are not for UCX."""


def probe_files(resolved: ResolvedLaunch) -> Probes:
    """Look at the files of weights, at the folders that must be writable, at the connector, and for
    the packages of extras.
    """
    transfer = resolved.config.kv_transfer
    problems = {
        f"kv_transfer.{transfer.carrier}.{field}": why_not_writable(folder)
        for field, folder in transfer.carrier_settings.folders.items()
    }
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
            factory = connector_settings(name).factory
        except ConnectorImportError as error:
            errors[name] = str(error)
            continue
        # Rules check what pdlaunch's own connectors need; others can only be imported.
        if not factory.startswith("pdlaunch.") and (why := why_not_importable(factory, os.environ)):
            errors[name] = f"connector {name} cannot be imported from {factory}: {why}"
    return errors


def sets_ucx(launch: ResolvedLaunch) -> bool:
    """Return whether the user has set variables that can make NIXL refuse to start."""
    return any(
        name.startswith(("UCX_", "NIXL_")) and name not in _OF_IMAGES
        for engines in launch.roles.values()
        for name in engines.given_environ
    )


_Question = tuple[tuple[tuple[str, str], ...], str | None]
"""Variables of a rank and its device; None, where there is no GPU: no backend is made."""


def ask_nixl(launch: ResolvedLaunch) -> dict[Role, NixlAnswer]:
    """Return what NIXL says to the environment of each role's ranks; empty without NIXL.

    NIXL is asked in processes of its own; equal ranks are asked once, others at the same time.
    """
    if not uses_ucx(launch):
        return {}
    questions = {role: _question(each) for role, each in launch.roles.items() if role in PAIR}
    # Ask once if both roles have the same question: an answer takes seconds.
    asked = list(dict.fromkeys(questions.values()))
    with ThreadPoolExecutor(max_workers=max(1, len(asked))) as threads:
        answers = dict(zip(asked, threads.map(lambda item: _ask(launch, item), asked), strict=True))
    return {role: answers[question] for role, question in questions.items()}


def _question(engines: RoleEngines) -> _Question:
    indices = engines.device_indices(0, 1)
    gpu = f"cuda:{indices[0]}" if indices else None
    return tuple(sorted(engines.environment.items())), "cpu" if engines.device == "cpu" else gpu


def _ask(launch: ResolvedLaunch, question: _Question) -> NixlAnswer:
    variables, device = question
    environ = {
        "UCX_WARN_UNUSED_ENV_VARS": "y",
        **launch.environ,
        **{name: value for name, value in variables if name != "UCX_WARN_UNUSED_ENV_VARS"},
        # What is said must come out here, whatever the user has done about logs.
        "UCX_LOG_LEVEL": "warn",
        "NIXL_LOG_LEVEL": "WARN",
    }
    environ.pop("UCX_LOG_FILE", None)
    # The address of a host, of which this machine need not be one; nothing is opened to others.
    devices = environ.get("UCX_NET_DEVICES", "").split(",")
    if any(map(is_address, devices)):
        of_others = [name for name in devices if not is_address(name)]
        environ["UCX_NET_DEVICES"] = ",".join(["lo", *of_others])
    command = [sys.executable, "-P", "-m", _TRIAL, *([device] if device else [])]
    return read_nixl_answer(run_briefly(command, environ, _NIXL_TIMEOUT_S))


def read_nixl_answer(outcome: ProcessOutcome) -> NixlAnswer:
    """Read what the process has printed."""
    written = (*outcome.output, *outcome.errors)
    lines = [match.groups() for match in map(_UCX_LINE.search, written) if match]
    warnings = [text for level, text in lines if level == "WARN"]
    said = next((line for line in reversed(outcome.output) if _ANSWER.match(line)), None)
    if said is None:  # It crashed, or was killed at its deadline.
        stage = "refused" if "imported" in outcome.output else "import"
        said = f"{stage}: {outcome.problem()}"
    stage, _, why = said.partition(": ")
    errors = list(dict.fromkeys(text for level, text in lines if level != "WARN"))
    # NIXL judges some settings itself; its first line says most, others repeat it.
    errors = errors or [match[1] for match in map(_NIXL_LINE.match, written) if match][:1]
    return NixlAnswer(
        import_error=why if stage == "import" else None,
        refusal="; ".join(errors[:2]) or why if stage == "refused" else None,
        warnings=tuple(dict.fromkeys(text for text in warnings if _WORTH_SAYING.search(text))),
    )
