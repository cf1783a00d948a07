"""Cases of the rules on where engines are placed, and on KV blocks from host to host."""

from dataclasses import replace

from pdlaunch.checks.rule import Context, make_context
from pdlaunch.planning.plan import ResolvedHost, settled
from pdlaunch.planning.resolve import resolve_on
from tests.checks.contexts import CPU, GPU, Case, on

WIDE = replace(CPU, num_cpus=4)


def hosts(*listed, machines=(WIDE, WIDE), environs=({}, {}), local="10.0.0.1", **config) -> Context:
    context = on(WIDE, placement="hosts", hosts=listed, **config)
    here = ResolvedHost("local", WIDE, {}, local, local, frozenset())
    joined = [
        settled(settings, ResolvedHost(settings.name, machine, environ, f"10.0.0.{place + 2}"))
        for place, (settings, machine, environ) in enumerate(
            zip(context.config.hosts, machines, environs, strict=True)
        )
    ]
    models = {role: engines.model for role, engines in context.launch.roles.items()}
    launch = resolve_on(context.config, [here, *joined], {}, models)
    return make_context(launch, context.origins, context.probes)


A, B = {"name": "a", "advertise_address": "10.0.0.2"}, {"name": "b", "advertise_address": "fd00::3"}
LONE = {"name": "b", "advertise_address": "127.0.0.1"}
SPREAD = {"placement_strategy": "spread"}
TRUSTED = {"kv_transfer__trusted_network": True}
B4 = {"name": "b", "advertise_address": "10.0.0.3"}
ALONE = {"both__replicas": 1, "prefill__replicas": 0, "decode__replicas": 0}
TWO_NODES = {"nnodes": 2, "tensor_parallel_size": 2, **TRUSTED}


def far(*machines, **config):
    return hosts(A, B, machines=machines or (WIDE, WIDE), **SPREAD, **config)


def far_vllm(*machines, **config):
    machines = machines or (WIDE, WIDE)
    return hosts(A, B4, machines=machines, engine="vllm", **SPREAD, **config)


def near_vllm(**config):
    """Both sides of a pair on one of two hosts."""
    return hosts(A, B4, engine="vllm", **config)


CASES = {
    "PD424": Case(
        hosts(A, LONE),
        hosts(A, B, local="127.0.0.1"),
        quiet=[hosts(A, B), hosts(LONE | {"name": "a"}, LONE, local="127.0.0.1")],
    ),
    "PD452": Case(
        hosts(A | {"roles": "prefill"}, B | {"roles": "prefill"}),
        quiet=[hosts(A, B, decode__tensor_parallel_size=2)],
    ),
    "PD456": Case(
        far_vllm(prefill__nnodes=2, prefill__tensor_parallel_size=2),
        far_vllm(prefill__nnodes=2, prefill__tensor_parallel_size=3, **TRUSTED),
        far_vllm(nnodes=3, tensor_parallel_size=3, **TRUSTED),
        far_vllm(kv_transfer__connector="vllm-nixl", **TWO_NODES),
        far(**TWO_NODES),
        far(decode__data_parallel_size=2),
        far(pipeline_parallel_size=2),
        far_vllm(data_parallel_size=2, **TWO_NODES),
        on(WIDE, engine="vllm", **TWO_NODES),
        quiet=[
            far_vllm(**TWO_NODES),
            far_vllm(data_parallel_size=2),
            far_vllm(nnodes=2, pipeline_parallel_size=2, **TRUSTED),
        ],
    ),
    "PD457": Case(
        far_vllm(environs=({"NCCL_IB_HCA": "mlx5_0"}, {}), **TWO_NODES),
        far_vllm(environs=({}, {"GLOO_SOCKET_IFNAME": "ib0"}), **TWO_NODES),
        quiet=[
            far_vllm(environs=({"NCCL_IB_HCA": "a"}, {"NCCL_IB_HCA": "b"}), **TWO_NODES),
            far_vllm(env={"NCCL_IB_HCA": "mlx5_0"}, **TWO_NODES),
            far_vllm(environs=({"NCCL_IB_HCA": "mlx5_0"}, {})),
        ],
    ),
    "PD455": Case(
        hosts(A, B, machines=(WIDE, GPU), prefill__replicas=3, **SPREAD),
        quiet=[
            hosts(A, B, machines=(WIDE, GPU), **SPREAD),
            hosts(A, B, machines=(WIDE, replace(WIDE, num_cpus=64)), prefill__replicas=3, **SPREAD),
        ],
    ),
    "PD423": Case(
        far(kv_transfer__nixl__path="p2p"),
        far_vllm(kv_transfer__nixl__path="p2p"),
        quiet=[far(), hosts(A, B, kv_transfer__nixl__path="p2p")],
    ),
    "PD428": Case(
        far(),
        far(kv_transfer__connector="mooncake"),
        far_vllm(),
        far_vllm(kv_transfer__connector="vllm-nixl"),
        quiet=[
            far(**TRUSTED),
            far_vllm(**TRUSTED),
            near_vllm(),
            far(kv_transfer__connector="file", kv_transfer__file__directory="/shared"),
            hosts(A | {"roles": "both"}, B, **ALONE),
        ],
    ),
}
