"""PD42x: addresses and ports."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.platform.facts import PortState
from pdlaunch.resolve.resolve import ListenAddress

_UNREACHABLE = ("127.", "localhost", "0.0.0.0", "::")


@rule(
    "PD420",
    "error",
    fix="Choose another port, or stop that process (ss -ltnp shows it).",
    source="bind().",
    needs=("ports",),
)
def port_busy(context: Context) -> Iterator[Found]:
    """A port is busy.

    Another process listens there.
    """
    for listener, state in _states(context):
        if state.problem == "busy":
            yield Found(
                listener.where,
                f"port {listener.port} of {listener.host} for the {listener.name} is busy",
            )


@rule(
    "PD421",
    "error",
    fix="Choose a port from 1024 on.",
    source="bind().",
    needs=("ports",),
)
def port_privileged(context: Context) -> Iterator[Found]:
    """A port needs privileges.

    Ports below net.ipv4.ip_unprivileged_port_start (1024) are for root.
    """
    for listener, state in _states(context):
        if state.problem == "privileged":
            yield Found(
                listener.where, f"port {listener.port} for the {listener.name} needs privileges"
            )


@rule(
    "PD422",
    "error",
    fix="Use 127.0.0.1 for this machine alone, or 0.0.0.0 for every address that it has.",
    source="bind() and getaddrinfo().",
    needs=("ports",),
)
def host_not_here(context: Context) -> Iterator[Found]:
    """The host to listen on is no address of this machine.

    A server listens on its own machine's addresses only.
    """
    for listener, state in _states(context):
        if state.problem in ("not here", "unknown host", "other"):
            yield Found(
                "host", f"the {listener.name} cannot listen on {listener.host!a}: {state.detail}"
            )


@rule(
    "PD424",
    "error",
    fix="Give an address of this machine that the other hosts can reach.",
    source="vLLM: the side channel listens on localhost by default, and the first request hangs.",
)
def side_channel_unreachable(context: Context) -> Iterator[Found]:
    """Peers on other hosts cannot reach the side channel.

    A rank tells its peers where to ask for blocks. localhost and 0.0.0.0 mean the peer's own
    machine there: every pull fails.
    """
    num_hosts = len(context.launch.machines)
    for engine in context.engines.values() if num_hosts > 1 else ():
        if engine.advertise_address.startswith(_UNREACHABLE):
            message = f"ranks on {num_hosts} hosts are told to ask {engine.advertise_address}"
            yield Found("side channel host", message)


def _states(context: Context) -> Iterator[tuple[ListenAddress, PortState]]:
    for listener in context.launch.listeners:
        state = (context.probes.ports or {}).get((listener.host, listener.port))
        if state is not None:
            yield listener, state
