"""What the checks judge is what is started, and what is printed: byte for byte, for any set-up."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.checks.probed import Probes
from pdlaunch.checks.rule import make_context
from pdlaunch.checks.run import run_checks
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.machine.host import expandable_segments_variable
from pdlaunch.machine.network import listening
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch, effective_engines, resolve
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import new_launch_keys
from tests.checks.contexts import SMALL_SHAPE

GIB = 1024**3
KEYS = new_launch_keys()


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


ALLOCATOR_VARIABLES = some(
    UCX_TLS=st.sampled_from(["all", "tcp", "posix", "^cma", "cuda,sm", ""]),
    PYTORCH_CUDA_ALLOC_CONF=st.sampled_from(["expandable_segments:True", ""]),
    HF_HUB_OFFLINE=st.sampled_from(["0", "1"]),
    OMP_NUM_THREADS=st.just("3"),
    CUDA_VISIBLE_DEVICES=st.sampled_from(["", "0", "1,0", "0,0", "2,3"]),
)
ENGINE = {
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    "max_model_len": st.integers(2, 9000),
    "kv_cache_memory": st.integers(2 * GIB, 8 * GIB),
    "gpu_memory_utilization": st.floats(0.1, 1.0),
    "enable_cumem_allocator": st.sampled_from([False, False, True]),
    "max_num_seqs": st.integers(1, 300),
    "max_num_batched_tokens": st.integers(1, 20_000),
    "num_threads": st.integers(1, 64),
    "async_scheduling": st.booleans(),
    "enforce_eager": st.booleans(),
    "kv_offload": some(host_memory=st.integers(0, GIB)),
    "env": ALLOCATOR_VARIABLES,
}
ROLE = some(replicas=st.integers(1, 3), tensor_parallel_size=st.sampled_from([1, 3]), **ENGINE)
CONFIGS = some(
    prefill=ROLE,
    decode=ROLE,
    served_model_name=st.just("mine"),
    block_size=st.sampled_from([16, 64]),
    enable_sleep_mode=st.booleans(),
    enable_prefix_caching=st.booleans(),
    kv_transfer=some(connector=st.sampled_from(["nixl", "mooncake"]), verify=st.booleans()),
    **ENGINE,
)
MACHINES = st.builds(
    Machine,
    num_cpus=st.integers(1, 64),
    memory_bytes=st.just(1024 * GIB),
    has_native_bf16=st.booleans(),
    gpus=st.integers(0, 4).map(
        lambda count: tuple(Gpu(index, memory_bytes=80 * GIB) for index in range(count))
    ),
)
SHAPES = st.builds(
    lambda windows, dtype: replace(
        SMALL_SHAPE, num_layers=len(windows), layer_windows=tuple(windows), dtype=dtype
    ),
    st.lists(st.sampled_from([None, 64, 512]), min_size=1, max_size=8),
    st.sampled_from([None, "float32", "bfloat16", "float16", "int8"]),
)


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS, machine=MACHINES, environ=ALLOCATOR_VARIABLES, shape=SHAPES)
def test_what_was_judged_is_what_is_started(
    config: dict[str, Any], machine: Machine, environ: dict[str, str], shape: ModelShape
) -> None:
    model = Model("m", "/models/m", shape)
    launch = resolve(
        LaunchConfig.model_validate(config),
        {"here": machine},
        environ,
        {"prefill": model, "decode": model},
    )
    judged = make_context(launch, {}, Probes()).engines
    report = run_checks(launch, {}, Probes(), rules=kind_of(launch).rules())
    if not report.is_ok():
        return
    ranks: Counter[tuple[str | None, str]] = Counter()
    for process, bootstrap in bootstraps(launch):
        if process.kind == "router":
            assert bootstrap.router is not None
            assert bootstrap.router.served_model_name == launch.served_model_name
            continue
        assert process.role is not None
        engines, spec = judged[process.role], bootstrap.engine()
        assert_same_settings(engines, spec, launch)
        if process.kind == "rank":
            assert_same_environment(engines, process, spec, environ)
            ranks[process.role, process.devices[0]] += 1
        else:
            assert process.ports == {"http": spec.http_port}
    for role, engines in judged.items():
        on_gpus = {
            (role, f"cuda:{place}"): engines.num_ranks_on(gpu.index)
            for place, gpu in enumerate(engines.gpus)
        }
        assert +Counter(on_gpus) == {
            place: count for place, count in ranks.items() if place in on_gpus
        }
    assert report.resolved["engines"] == effective_engines(launch)


def bootstraps(launch: ResolvedLaunch) -> list[tuple[ProcessSpec, Bootstrap]]:
    with tempfile.TemporaryDirectory() as folder, listening("127.0.0.1", 0) as listeners:
        made = Bootstraps(
            kind=kind_of(launch),
            keys=KEYS,
            control="ipc:///c",
            run_dir=Path(folder),
            launch_id="l",
            listeners=listeners,
        )
        return [
            (process, made.make(process, 1, launch)) for process in plan_processes(launch).processes
        ]


def assert_same_settings(engines: RoleEngines, spec: EngineSpec, launch: ResolvedLaunch) -> None:
    derived = engines.derived()
    for name in EngineSettings.model_fields:
        expected = derived[name] if name in derived else getattr(engines.settings, name)
        assert getattr(spec, name) == ({} if name == "env" else expected), name
    index = int(spec.name.rpartition("-")[2])
    assert spec.name == f"{engines.role}-{index}"
    placed = {engine.name: engine for engine in launch.engines}
    assert spec.device_indices == placed[spec.name].device_indices
    assert spec.tensor_parallel_size == engines.tp_size
    assert spec.model_dir == engines.model.path
    assert (spec.bind_address, spec.advertise_address) == (
        engines.on.bind_address,
        engines.on.advertise_address,
    )
    shown = effective_engines(launch)[engines.role]
    assert {name: shown[name] for name in derived} == derived


def assert_same_environment(
    engines: RoleEngines, process: ProcessSpec, spec: EngineSpec, environ: Mapping[str, str]
) -> None:
    assert process.environment == engines.environment
    child = {**environ, **process.environment}
    if "UCX_TLS" in engines.environment:
        assert tuple(child["UCX_TLS"].split(",")) == engines.ucx_transports
    assert process.num_threads == spec.num_threads
    place = spec.device_indices[process.tp_rank] if spec.device_indices else None
    assert process.devices == ("cpu" if place is None else f"cuda:{place}",)
    expandable = expandable_segments_variable(child)
    allocators = {
        "host": spec.device == "cpu",
        "cumem": spec.enable_cumem_allocator,
        "expandable_segments": expandable,
        "cuda": True,
    }
    assert engines.allocator == next(name for name, is_used in allocators.items() if is_used)
