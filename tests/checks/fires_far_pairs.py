"""For each rule on KV blocks from host to host (PD423, PD428, PD429, PD434, PD439, PD639): what
fires it, and its fixes.
"""

from __future__ import annotations

from dataclasses import replace

from tests.checks.fires_placement import WIDE
from tests.checks.firing import Case, Setup

_HOSTS = """
placement: hosts
control_address: 10.0.0.1
hosts:
  - {name: node-1, machine: a.json, bind_address: 10.0.0.2}
  - {name: node-2, machine: b.json, bind_address: 10.0.0.3}
"""
SPREAD = _HOSTS + "placement_strategy: spread\n"
PACKED = _HOSTS + "placement_strategy: pack\n"
TRANSLATED = SPREAD.replace("10.0.0.3", "10.0.0.3, advertise_address: 198.51.100.3")
VLLM = "engine: vllm\n"
TRUSTED = "trusted_network: true"
RDMA = replace(WIDE, rdma_devices=("mlx5_0",))


def far(
    *transfer: str, hosts: str = SPREAD, more: str = "", machine: object = WIDE, **environ: str
) -> Setup:
    """Prefill on one host, decode on another; ``transfer``: settings of ``kv_transfer``."""
    config = f"{hosts}kv_transfer: {{{', '.join(transfer)}}}\n{more}"
    machines = {"a.json": machine, "b.json": machine}
    return Setup(config, machine=WIDE, machines=machines, environ=environ)


CASES = [
    Case(
        "PD423",
        far(TRUSTED, "nixl: {path: p2p}"),
        {
            "Set kv_transfer.nixl.path to auto": far(TRUSTED, "nixl: {path: auto}"),
            "place prefill and decode engines on one host": far("nixl: {path: p2p}", hosts=PACKED),
        },
    ),
    Case(
        "PD428",
        far(),
        {
            "Set kv_transfer.trusted_network: true": far(TRUSTED),
            "use connector file": far("connector: file", "file: {directory: .}"),
            "place prefill and decode engines on one host": far(hosts=PACKED),
        },
    ),
    Case("PD429", far(TRUSTED), {"a firewall lets the hosts alone through": far(hosts=PACKED)}),
    Case(
        "PD434",
        far(TRUSTED, machine=RDMA, UCX_TLS="tcp,sm"),
        {
            "Add rc": far(TRUSTED, machine=RDMA, UCX_TLS="tcp,sm,rc"),
            "unset it": far(TRUSTED, machine=RDMA),
        },
    ),
    Case(
        "PD439",
        far(TRUSTED, UCX_TLS="sm"),
        {"Add tcp": far(TRUSTED, UCX_TLS="sm,tcp"), "unset it": far(TRUSTED)},
    ),
    Case(
        "PD630",
        far(
            "verify: off", TRUSTED, more=f"{VLLM}env: {{VLLM_NIXL_SIDE_CHANNEL_HOST: localhost}}\n"
        ),
        {"Unset VLLM_NIXL_SIDE_CHANNEL_HOST": far("verify: off", TRUSTED, more=VLLM)},
    ),
    Case(
        "PD639",
        far("verify: off", TRUSTED, hosts=TRANSLATED, more=VLLM),
        {
            "Leave advertise_address of that host out": far("verify: off", TRUSTED, more=VLLM),
            "set engine: native": far("verify: off", TRUSTED, hosts=TRANSLATED),
        },
    ),
]
