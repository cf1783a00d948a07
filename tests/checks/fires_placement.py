"""For each rule on where engines are placed (PD452 to PD456, PD424): what fires it, its fixes."""

from __future__ import annotations

from dataclasses import replace

from tests.checks.contexts import CPU, GPU
from tests.checks.firing import Case, Setup

_TWO = """
placement: hosts
kv_transfer: {trusted_network: true}
control_address: 10.0.0.1
hosts:
  - {name: node-1, machine: a.json, bind_address: 10.0.0.2%s}
  - {name: node-2, machine: b.json, bind_address: 10.0.0.3%s}
"""
WIDE = replace(CPU, cpus=tuple(range(4)), memory_bytes=64 << 30)


def two_hosts(first: str = "", second: str = "", more: str = "", other: object = WIDE) -> Setup:
    """Two hosts whose machines are known; ``first``, ``second``: more of what is said of them."""
    config = _TWO % (first and f", {first}", second and f", {second}")
    machines = {"a.json": WIDE, "b.json": other}
    return Setup(config + more, machine=WIDE, machines=machines)


def on_gpus(more: str) -> Setup:
    config = _TWO % ("", "") + more
    return Setup(config, machine=GPU, machines={"a.json": GPU, "b.json": GPU})


SPREAD = "placement_strategy: spread\n"
DOMAINS = ("domain: rack-1", "domain: rack-2")

CASES = [
    Case(
        "PD452",
        two_hosts("roles: prefill", "roles: prefill"),
        {
            "List more hosts": two_hosts("roles: prefill", "roles: decode"),
            "leave roles of hosts out": two_hosts(more=SPREAD),
        },
    ),
    Case(
        "PD452",
        two_hosts(more="prefill: {tensor_parallel_size: 2, hosts_per_engine: 3}\n" + SPREAD),
        {"lower hosts_per_engine": two_hosts(more="prefill: {tensor_parallel_size: 2}\n" + SPREAD)},
    ),
    Case(
        "PD453",
        two_hosts(*DOMAINS, SPREAD),
        {
            "Use placement_strategy pack": two_hosts(*DOMAINS),
            "hosts of one domain": two_hosts(DOMAINS[0], DOMAINS[0], SPREAD),
        },
    ),
    Case(
        "PD454",
        two_hosts(),
        {
            "start more engines": two_hosts(more="prefill: {replicas: 3}\ndecode: {replicas: 3}\n"),
            "set placement_strategy to spread": two_hosts(more=SPREAD),
        },
    ),
    Case(
        "PD455",
        two_hosts(
            more="prefill: {replicas: 3}\nplacement_strategy: spread\n",
            other=GPU,
        ),
        {
            "Set these for the role": two_hosts(
                more="device: cpu\nprefill: {replicas: 3}\n" + SPREAD,
                other=GPU,
            ),
            "hosts that are alike": two_hosts(more="prefill: {replicas: 3}\n" + SPREAD),
        },
    ),
    Case(
        "PD456",
        on_gpus("decode: {tensor_parallel_size: 2, hosts_per_engine: 2}\n"),
        {
            "Set hosts_per_engine to 1": on_gpus("decode: {tensor_parallel_size: 2}\n"),
        },
    ),
    Case(
        "PD424",
        two_hosts("advertise_address: 127.0.0.1"),
        {"Give an address of this machine": two_hosts("advertise_address: 10.0.0.9")},
    ),
]
