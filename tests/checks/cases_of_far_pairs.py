"""Cases of the rules on KV blocks from host to host."""

from tests.checks.case import Case
from tests.checks.cases_of_placement import SPREAD, WIDE, A, B, hosts

TRUSTED = {"kv_transfer__trusted_network": True}


B4 = {"name": "b", "advertise_address": "10.0.0.3"}


def far(*machines, **config):
    return hosts(A, B, machines=machines or (WIDE, WIDE), **SPREAD, **config)


def far_vllm(*machines, **config):
    machines = machines or (WIDE, WIDE)
    return hosts(A, B4, machines=machines, engine="vllm", **SPREAD, **config)


def near_vllm(**config):
    """Both sides of a pair on one of two hosts."""
    return hosts(A, B4, engine="vllm", **config)


CASES = {
    "PD423": Case(
        [far(kv_transfer__nixl__path="p2p"), far_vllm(kv_transfer__nixl__path="p2p")],
        [far(), hosts(A, B, kv_transfer__nixl__path="p2p")],
    ),
    "PD428": Case(
        [
            far(),
            far(kv_transfer__connector="mooncake"),
            far_vllm(),
            far_vllm(kv_transfer__connector="vllm-nixl"),
        ],
        [
            far(**TRUSTED),
            far_vllm(**TRUSTED),
            near_vllm(),
            far(kv_transfer__connector="file", kv_transfer__file__directory="/shared"),
            hosts(
                A | {"roles": "both"}, B, both__replicas=1, prefill__replicas=0, decode__replicas=0
            ),
        ],
    ),
}
