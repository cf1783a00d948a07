"""Cases of the rules on KV blocks from host to host."""

from dataclasses import replace

from tests.checks.case import Case
from tests.checks.cases_of_placement import SPREAD, WIDE, A, B, hosts

TRUSTED = {"kv_transfer__trusted_network": True}
RDMA = replace(WIDE, rdma_devices=("mlx5_0",))


def far(*machines, **config):
    return hosts(A, B, machines=machines or (WIDE, WIDE), **SPREAD, **config)


CASES = {
    "PD423": Case(
        [far(kv_transfer__nixl__path="p2p")],
        [far(), hosts(A, B, kv_transfer__nixl__path="p2p")],
    ),
    "PD428": Case(
        [far(), far(kv_transfer__connector="mooncake"), far(kv_transfer__nixl__path="nixl")],
        [
            far(**TRUSTED),
            hosts(A, B),
            far(kv_transfer__connector="file", kv_transfer__file__directory="/shared"),
            hosts(
                A | {"roles": "both"}, B, both__replicas=1, prefill__replicas=0, decode__replicas=0
            ),
        ],
    ),
    "PD429": Case([far(**TRUSTED)], [far(), hosts(A, B, **TRUSTED)]),
    "PD434": Case(
        [far(RDMA, RDMA, env__UCX_TLS="tcp,sm", **TRUSTED)],
        [
            far(RDMA, RDMA, **TRUSTED),
            far(env__UCX_TLS="tcp,sm", **TRUSTED),
            hosts(A, B, machines=(RDMA, RDMA), env__UCX_TLS="tcp,sm"),
        ],
    ),
    "PD439": Case(
        [far(env__UCX_TLS="sm", **TRUSTED), far(env__UCX_TLS="rc,sm", **TRUSTED)],
        [far(RDMA, RDMA, env__UCX_TLS="rc,sm", **TRUSTED), far(**TRUSTED), far(env__UCX_TLS="sm")],
    ),
    "PD639": Case([far(engine="vllm")], [far(**TRUSTED)]),
}
