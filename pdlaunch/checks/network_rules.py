"""Rules PD409, PD418 and PD42x judge addresses, ports and open sockets."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.http_names import WILDCARDS, is_loopback
from pdlaunch.machine.facts import PortState
from pdlaunch.planning.resolve import ListenAddress


@rule(
    "PD420",
    "error",
    fix="Choose another port, or stop that process (ss -ltnp shows it).",
    source="bind().",
    needs=("ports",),
    on_vllm=True,
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
    on_vllm=True,
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
    on_vllm=True,
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
    on_vllm=True,
)
def side_channel_unreachable(context: Context) -> Iterator[Found]:
    """Peers on other hosts cannot reach a host.

    Ranks and servers tell others where to ask. To a peer on another host, localhost and 0.0.0.0
    mean its own machine: every pull fails. Where all hosts have such an address they are one
    machine.
    """
    hosts = [host for host in context.launch.hosts if host.advertise_address]
    local = [host for host in hosts if is_local_alone(host.advertise_address)]
    for host in local if len(local) < len(hosts) else ():
        is_own = host is context.launch.hosts[0]
        place = "control_address" if is_own else "hosts.advertise_address"
        yield Found(place, f"others are told to reach {host.name} at {host.advertise_address}")


@rule(
    "PD409",
    "warning",
    fix=(
        "Use connector nixl, which listens nowhere. In a network namespace of its own a deployment "
        "is safe, though the warning stays."
    ),
    source="Listening sockets of Mooncake 0.3.13 (measured); SO_BINDTODEVICE in socket(7).",
)
def mooncake_sockets(context: Context) -> Iterator[Found]:
    """Mooncake's sockets admit every process of this machine.

    Each rank listens on two ports without authentication. pdlaunch binds them to the loopback
    device, so that no other host reaches them; a process of this machine could still read and write
    KV blocks.
    """
    if context.uses("mooncake"):
        yield Found(
            "kv_transfer.connector",
            "mooncake listens without authentication on this machine's loopback device",
        )


@rule(
    "PD418",
    "error",
    fix="Use Linux 5.7 or later or give the ranks CAP_NET_RAW, or use connector nixl.",
    source="SO_BINDTODEVICE in socket(7).",
    needs=("limits",),
)
def mooncake_device_binding(context: Context) -> Iterator[Found]:
    """Mooncake's sockets cannot be closed to other hosts.

    It listens on all addresses, and the kernel does not let this user bind sockets to the loopback
    device: the ranks refuse to start.
    """
    if context.uses("mooncake") and not context.machine.limits.can_bind_to_device:
        yield Found("kv_transfer.connector", "the sockets of mooncake would be open to every host")


@rule(
    "PD425",
    "warning",
    fix=(
        "Use one rank an engine. In a network namespace of its own a deployment is safe, though "
        "the warning stays."
    ),
    source="Listening sockets of torch 2.13's gloo (measured).",
)
def gloo_sockets(context: Context) -> Iterator[Found]:
    """Gloo's sockets admit every process of this machine.

    The ranks of a tensor parallel group on a CPU exchange activations over TCP. Each listens on a
    port of the loopback device without authentication: a process of this machine that is there
    while a group is formed could take a rank's place.
    """
    for engine in context.on("cpu"):
        if engine.tp_size > 1:
            place = engine.where("tensor_parallel_size")
            yield Found(
                place,
                (
                    f"each of {engine.tp_size} ranks listens without authentication on this "
                    "machine's loopback device"
                ),
            )


def is_local_alone(address: str) -> bool:
    """Return whether peers on other hosts would reach themselves at this address."""
    return address in WILDCARDS or is_loopback(address)


def _states(context: Context) -> Iterator[tuple[ListenAddress, PortState]]:
    for listener in context.launch.listeners:
        state = (context.probes.ports or {}).get((listener.host, listener.port))
        if state is not None:
            yield listener, state
