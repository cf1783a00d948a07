"""Cases of rules and their contexts: healthy machines, and what a test changes of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdlaunch.checks.probed import PairTransport, Probes, SeenDeployment
from pdlaunch.checks.rule import Context, make_context
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.models import Model
from pdlaunch.planning.resolve import resolve

GIB = 1024**3

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    model_type="llama",
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
    layer_windows=(None,) * 32,
    dtype="bfloat16",
    tie_word_embeddings=False,
    eos_token_ids=(2,),
    layer_weights={},
    other_weights={"all": (8_030_261_248,)},
)
SMALL_SHAPE = replace(
    SHAPE,
    num_layers=30,
    num_attention_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    layer_windows=(None,) * 30,
    layer_weights={},
    other_weights={"all": (134_515_008,)},
)

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
"""config.json of a model."""

CPU = Machine(
    num_cpus=16,
    has_native_bf16=True,
    memory_bytes=64 * GIB,
    driver_error="no CUDA driver",
    shm_bytes=16 * GIB,
    shm_free_bytes=15 * GIB,
)
GPU = replace(
    CPU,
    gpus=tuple(
        Gpu(index, "NVIDIA H200", 139 * GIB, has_virtual_memory=True, has_fabric_handles=False)
        for index in range(8)
    ),
)
GB200 = replace(
    GPU,
    gpus=tuple(
        Gpu(index, "NVIDIA GB200", 186 * GIB, has_virtual_memory=True, has_fabric_handles=True)
        for index in range(4)
    ),
)

NOTHING_WRONG: dict[str, Any] = {
    name: {} for name in ("ports", "missing_extras", "weight_errors", "engine_commands")
}
"""Fields of ``Probes`` that were looked at, without a finding."""

ROUTER = ("127.0.0.1", 8000)
PAIR = PairTransport("decode-0/rank-0", "prefill-0/rank-0", "nixl/UCX", "cuda", 390.0)
ONE_GPU = replace(GPU, gpus=GPU.gpus[:1])
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
SLIDING = replace(SMALL_SHAPE, layer_windows=(1024,) * 30)
TIER = {"kv_offload__host_memory": "8GiB"}


def on(
    machine: Machine,
    /,
    environ: Mapping[str, str] | None = None,
    shapes: tuple[ModelShape | None, ModelShape | None] | None = None,
    model_error: ConfigError | None = None,
    has_state: bool = False,
    paths: tuple[str, str] = ("/models/a", "/models/a"),
    probes: Mapping[str, Any] | None = None,
    pairs: tuple[PairTransport, ...] = (),
    **config: Any,
) -> Context:
    """Make a context in which every fact is known.

    ``probes``: fields of ``Probes``; ``config``: settings by path, ``__`` for dots.
    """
    tree: dict[str, Any] = {}
    for path, value in config.items():
        *sections, name = path.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    given = {path.replace("__", "."): "deploy.yaml:1:1" for path in config}
    shape = SHAPE if machine.gpus else SMALL_SHAPE
    prefill, decode = (
        Model("a", path, each, error=model_error, has_state=has_state)
        for path, each in zip(paths, shapes or (shape, shape), strict=True)
    )
    models = {"prefill": prefill, "decode": decode, "both": decode}
    launch = resolve(LaunchConfig.model_validate(tree), {"host": machine}, environ or {}, models)
    known = NOTHING_WRONG | {"deployment": SeenDeployment((), ())}
    return make_context(launch, given, Probes(**{**known, "transport": pairs, **(probes or {})}))


class Case:
    """Contexts in which a rule fires, and near misses."""

    def __init__(self, *fires: Context, quiet: list[Context]) -> None:
        self.fires, self.quiet = fires, quiet


def lacks(*extras):
    return {"missing_extras": dict.fromkeys(extras, "a_module")}


def mooncake(base, **config):
    return on(base, kv_transfer__connector="mooncake", **config)


def p2p(base, **config):
    return on(base, kv_transfer__nixl__path="p2p", **config)


def show(value):
    return {"CUDA_VISIBLE_DEVICES": value}


def gpus(**changes):
    """The machine with GPUs, all of them changed."""
    return replace(GPU, gpus=tuple(replace(gpu, **changes) for gpu in GPU.gpus))
