"""Asks NIXL, in short-lived processes, what it says of the ranks' settings of UCX."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pdlaunch.config.roles import PAIR, Role
from pdlaunch.config.ucx_variables import is_known_variable
from pdlaunch.machine.availability import ProcessOutcome, run_briefly
from pdlaunch.machine.network import is_address
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

TIMEOUT_S = 60.0
"""Longest life of such a process; it takes 3 to 5 s on a quiet core."""

_MODULE = "pdlaunch.transfer.connectors.nixl_trial"
_ANSWER = re.compile(r"ok$|import: |refused: ")
_UCX_LINE = re.compile(r"\bUCX\s+(WARN|ERROR|FATAL)\s+(.*\S)")
_NIXL_LINE = re.compile(r"E\d{4} [\d:.]+ +\d+ \S+\] (.*\S)")
_UNUSED = re.compile(r"unused environment variables?: (.*)")
_UNUSED_ITEM = re.compile(r"(\w+)(?: \(maybe: ([^?)]*)\?\))?")
_NOT_AVAILABLE = re.compile(r"\b(is|are) not available\b")


@dataclass(frozen=True, slots=True)
class NixlAnswer:
    """Holds what NIXL said to one role's settings."""

    import_error: str | None = None
    """The reason why it cannot be imported; None: it can."""
    refusal: str | None = None
    """UCX's reason why a rank's backend cannot be made; None: it can, or was not tried."""
    unavailable: tuple[str, ...] = ()
    """UCX's warnings of transports and devices that it does not find."""
    unused: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that UCX did not look at, and the name that it believes was meant."""


def ask_nixl(launch: ResolvedLaunch) -> dict[Role, NixlAnswer]:
    """Return what NIXL says to the environment of each role's ranks; empty without NIXL.

    Equal ranks are asked once, others at the same time.
    """
    if not uses_ucx(launch):
        return {}
    questions = {role: _question(each) for role, each in launch.roles.items() if role in PAIR}
    asked = list(dict.fromkeys(questions.values()))
    with ThreadPoolExecutor(max_workers=max(1, len(asked))) as threads:
        answers = dict(zip(asked, threads.map(lambda item: _ask(launch, item), asked), strict=True))
    return {role: answers[question] for role, question in questions.items()}


def uses_ucx(launch: ResolvedLaunch) -> bool:
    """Return whether pdlaunch's own ranks load NIXL, whose UCX may move KV blocks; path p2p does
    without.
    """
    transfer = launch.config.kv_transfer
    is_native = all(each.settings.engine == "native" for each in launch.roles.values())
    return (
        is_native and launch.has_pair and transfer.carrier == "nixl" and transfer.nixl.path != "p2p"
    )


def sets_ucx(launch: ResolvedLaunch) -> bool:
    """Return whether the user has set variables that can make NIXL refuse to start."""
    return any(
        is_known_variable(name) or name.startswith("NIXL_")
        for engines in launch.roles.values()
        for name in engines.given_environ
    )


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
    words = list(dict.fromkeys(text for level, text in lines if level != "WARN"))
    # NIXL judges some settings itself; its first line says most, others repeat it.
    words = words or [match[1] for match in map(_NIXL_LINE.match, written) if match][:1]
    return NixlAnswer(
        import_error=why if stage == "import" else None,
        refusal="; ".join(words[:2]) or why if stage == "refused" else None,
        unavailable=tuple(dict.fromkeys(text for text in warnings if _NOT_AVAILABLE.search(text))),
        unused=dict(item for text in warnings for item in _unused(text)),
    )


_Question = tuple[tuple[tuple[str, str], ...], str | None]
"""Variables of a rank and its device; None, where there is no GPU: no backend is made."""


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
    command = [sys.executable, "-P", "-m", _MODULE, *([device] if device else [])]
    return read_nixl_answer(run_briefly(command, environ, TIMEOUT_S))


def _unused(text: str) -> Iterator[tuple[str, str | None]]:
    if found := _UNUSED.search(text):
        for item in found[1].split("; "):
            if match := _UNUSED_ITEM.match(item):
                yield match[1], match[2]
