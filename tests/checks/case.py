"""A case of a rule, and how the contexts of cases are made."""

from dataclasses import dataclass, replace

from pdlaunch.checks.context import Context
from pdlaunch.checks.probed import PairTransport
from tests.checks.contexts import CPU, GPU, SMALL_SHAPE, on

ROUTER = ("127.0.0.1", 8000)
PAIR = PairTransport("decode-0/rank-0", "prefill-0/rank-0", "nixl/UCX", "cuda", 390.0)
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
SLIDING = replace(SMALL_SHAPE, layer_windows=(1024,) * 30)
TIER = {"kv_offload__host_memory": "8GiB"}


@dataclass(frozen=True)
class Case:
    fires: list[Context]
    quiet: list[Context]


def lacks(*extras):
    """Probes of a Python that does not find these extras."""
    return {"missing_extras": dict.fromkeys(extras, "a_module")}


def machine(base=CPU, **changes):
    return replace(base, **changes)


def mooncake(base, **config):
    return on(base, kv_transfer__connector="mooncake", **config)


def p2p(base, **config):
    return on(base, kv_transfer__nixl__path="p2p", **config)


def one_gpu(**changes):
    return replace(GPU, gpus=GPU.gpus[:1], **changes)
