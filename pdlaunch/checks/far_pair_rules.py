"""Rules PD423, PD428, PD429, PD439 and PD639 judge the ways of KV blocks from host to host."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.ucx import RDMA, TCP, opens_network, setting
from pdlaunch.planning.roles import PlacedEngine

_TRUSTED = "kv_transfer.trusted_network"
_WITHOUT_FILE = (
    f"Set {_TRUSTED}: true where nobody else reaches that network (docs/hosts.md has the rules for "
    "a firewall), or place prefill and decode engines on one host."
)
_PORTS = "UCX 1.19 and Mooncake 0.3.13: neither knows whom it talks to (measured)."


@rule(
    "PD423",
    "error",
    fix="Set kv_transfer.nixl.path to auto, or place prefill and decode engines on one host.",
    source="Memory is mapped through file descriptors and handles of one kernel.",
)
def path_within_a_host(context: Context) -> Iterator[Found]:
    """The path of KV blocks ends at the host, and engines of a pair are on different ones.

    Path p2p maps the memory of a peer, which only processes of the same host can.
    """
    if _far_engines(context) and not context.config.kv_transfer.joins_hosts:
        hosts = ", ".join(_names_of_hosts(context))
        yield Found("kv_transfer.nixl.path", f"p2p does not join the hosts {hosts}")


@rule(
    "PD428",
    "error",
    fix=(
        f"Set {_TRUSTED}: true where nobody else reaches that network (docs/hosts.md has the "
        "rules for a firewall), use connector file, or place prefill and decode engines on one "
        "host."
    ),
    source=_PORTS,
    on_vllm=True,
)
def network_is_not_trusted(context: Context) -> Iterator[Found]:
    """KV blocks would go between hosts over ports that ask nobody who he is.

    NIXL's UCX and Mooncake cannot authenticate their peers, nor encrypt. Whoever reaches the data
    port of a rank can read and write the memory of its process: prompts, answers, and what it
    computes. The side channel of an engine of vLLM, at one of these ports too, tells everybody
    where that memory is, and ends at a query for a rank that does not exist. So they open only
    where the network is said to be trusted.
    """
    transfer = context.config.kv_transfer
    if (opening := _opening_engines(context)) and not transfer.trusted_network:
        hosts = ", ".join(_names_of_hosts(context))
        message = f"engines of a pair are on different hosts ({hosts})"
        # vLLM takes no other connector.
        fix = None if opening[0].engines.is_native else _WITHOUT_FILE
        yield Found(_TRUSTED, f"{message}, and their network is not said to be trusted", fix)


@rule(
    "PD429",
    "info",
    fix=(
        "Nothing to fix where a firewall lets the hosts alone through to these ports; "
        "docs/hosts.md has its rules."
    ),
    source=_PORTS,
    on_vllm=True,
)
def open_data_ports(context: Context) -> Iterator[Found]:
    """Ranks take KV blocks at ports that ask nobody who he is.

    The network was said to be trusted. UCX listens at one port of each rank, on the device of the
    host's address alone; of vLLM at one for each thread of NIXL, and its side channel at another.
    """
    transfer = context.config.kv_transfer
    if transfer.trusted_network:
        hosts = {engine.host.name: engine.host for engine in _opening_engines(context)}
        for host in hosts.values():
            address = host.bind_address or "its address"
            message = f"{host.name} takes KV blocks at {address}, ports {transfer.data_ports}"
            yield Found(_TRUSTED, message)


@rule(
    "PD439",
    "error",
    fix="Add tcp (or rc) to UCX_TLS, or unset it.",
    source="UCX_TLS, UCX 1.19 as NIXL 1.5.1 ships it.",
    on_vllm=True,
)
def ucx_joins_no_hosts(context: Context) -> Iterator[Found]:
    """UCX_TLS leaves no transport between hosts.

    Engines of a pair are on different hosts, and what is left joins processes of one host alone:
    the handshake of such a pair fails.
    """
    if not context.moves_over_ucx or not context.config.kv_transfer.trusted_network:
        return
    far = {
        share.host.name: share.engines
        for engine in _far_engines(context)
        for share in engine.shares
        if share.engines.has_far_peers
    }
    for engines in far.values():
        if not opens_network(engines.environment):
            wanted = " or ".join(sorted(TCP | RDMA if engines.machine.rdma_devices else TCP))
            yield Found(
                context.where_variable(engines, "UCX_TLS"),
                f"UCX_TLS {setting(engines.given_environ)} has none of {wanted}",
            )


@rule(
    "PD639",
    "error",
    fix="Leave advertise_address of that host out, or set engine: native.",
    source="vLLM 0.32: VLLM_NIXL_SIDE_CHANNEL_HOST is bound and told to decode engines.",
)
def vllm_has_one_address(context: Context) -> Iterator[Found]:
    """An engine of vLLM would be told to bind one address, and others to reach it at another.

    Its side channel has one address for both. Behind address translation engines of other hosts
    would ask where nobody listens, and compute every prompt themselves.
    """
    hosts = {
        engine.host.name: engine.host
        for engine in _far_engines(context)
        if not engine.engines.is_native
    }
    for host in hosts.values():
        if host.bind_address and host.advertise_address != host.bind_address:
            yield Found(
                "hosts.advertise_address",
                f"{host.name} listens at {host.bind_address}, and others are told "
                f"{host.advertise_address}",
            )


def _far_engines(context: Context) -> list[PlacedEngine]:
    """Return the engines that exchange KV blocks with engines on other hosts."""
    return [
        engine
        for engine in context.launch.engines
        if any(share.engines.has_far_peers for share in engine.shares)
    ]


def _opening_engines(context: Context) -> list[PlacedEngine]:
    """Return those of them that open ports for it; vLLM has NIXL alone, whatever the path."""
    opens = context.config.kv_transfer.opens_data_ports
    return [each for each in _far_engines(context) if opens or not each.engines.is_native]


def _names_of_hosts(context: Context) -> list[str]:
    return list(dict.fromkeys(engine.host.name for engine in _far_engines(context)))
