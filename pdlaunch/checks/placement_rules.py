"""Rules PD452 to PD456 judge on which hosts engines are placed."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.roles import Role
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine

_OF_HOST = frozenset(("num_threads",))
"""Derived values that may differ between engines of one role."""


@rule(
    "PD452",
    "error",
    fix="List more hosts, lower hosts_per_engine, or leave roles of hosts out.",
    source="Hosts take engines of their roles alone.",
    on_vllm=True,
)
def too_few_hosts(context: Context) -> Iterator[Found]:
    """Too few hosts take the engines of a role.

    An engine needs a host that takes its role, and as many as its ranks are to be spread over.
    """
    for role, engines in context.engines.items() if context.config.placement != "local" else ():
        there = sum(role in host.roles for host in context.launch.hosts)
        wanted = engines.settings.hosts_per_engine
        if there < wanted:
            message = f"a {role} engine needs {wanted}, {there} of the hosts take this role"
            yield Found("hosts" if not there else engines.where("hosts_per_engine"), message)


@rule(
    "PD453",
    "warning",
    fix=(
        "Use placement_strategy pack, or list hosts of one domain next to each other with room for "
        "both sides."
    ),
    source="KV blocks go from prefill to decode over whatever joins their hosts.",
    on_vllm=True,
)
def pair_far_apart(context: Context) -> Iterator[Found]:
    """Prefill and decode engines are in different domains.

    Their hosts share neither NVLink nor RDMA, as `domain` of the hosts says: every request's KV
    blocks take a slower way, where the same domain has an engine of neither side to pair with.
    """
    domains: dict[Role, dict[str, str]] = {
        role: {
            engine.host.domain: engine.name
            for engine in reversed(context.launch.engines)
            if engine.engines.role == role
        }
        for role in context.engines
    }
    prefill, decode = domains.get("prefill", {}), domains.get("decode", {})
    if "" in prefill or "" in decode:
        return
    for domain, name in decode.items():
        if prefill and domain not in prefill:
            others = ", ".join(prefill)
            message = f"{name} is in domain {domain}, prefill engines are in {others} alone"
            yield Found("hosts", message)


@rule(
    "PD454",
    "warning",
    fix="Take it off hosts, start more engines, or set placement_strategy to spread.",
    source="The placement that `pdlaunch serve --dry-run` prints.",
    on_vllm=True,
)
def idle_host(context: Context) -> Iterator[Found]:
    """A host gets no engine.

    Engines fill the hosts in turn, and there is none left for it; its agent is waited for all the
    same.
    """
    used = {host.name for host in context.launch.engine_hosts}
    for host in context.launch.hosts:
        if host.roles and host.name not in used:
            yield Found("hosts", f"no engine is placed on {host.name}")


@rule(
    "PD455",
    "error",
    fix="Set these for the role, or place its engines on hosts that are alike.",
    source="Values are derived on each host: dtype auto is float32 on a CPU without bfloat16.",
    on_vllm=True,
)
def hosts_differ(context: Context) -> Iterator[Found]:
    """Engines of one role come to different values on different hosts.

    Pairs are judged by role, and a request may go to any engine of it: with another dtype or device
    an engine would refuse the blocks, or answer with other tokens.
    """
    for role in context.engines:
        engines = [engine for engine in context.launch.engines if engine.engines.role == role]
        shares = [share.engines for engine in engines for share in engine.shares]
        for other in {share.host: share for share in shares[1:]}.values():
            yield from _differences(engines[0], other)


@rule(
    "PD456",
    "error",
    fix="Set hosts_per_engine to 1.",
    source="The connections of gloo, NCCL and vLLM's groups have no keys.",
    on_vllm=True,
)
def engine_over_hosts(context: Context) -> Iterator[Found]:
    """The ranks of an engine are on several hosts.

    They would be joined over connections that admit everybody. Tensor parallelism works within one
    host.
    """
    for engines in context.engines.values():
        num_hosts = engines.settings.hosts_per_engine
        if num_hosts > 1 and engines.tp_size > 1:
            yield Found(
                engines.where("hosts_per_engine"),
                f"hosts_per_engine is {num_hosts}: the ranks of a {engines.role} engine run on one "
                "host",
            )


def _differences(first: PlacedEngine, other: RoleEngines) -> Iterator[Found]:
    mine, theirs = first.engines.derived(), other.derived()
    for name in mine.keys() - _OF_HOST:
        if mine[name] != theirs[name]:
            yield Found(
                first.engines.where(name),
                f"it is {mine[name]} on {first.host.name} and {theirs[name]} on {other.host}",
            )
