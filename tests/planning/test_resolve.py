import json
from pathlib import Path

import pytest

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.models import LaunchConfig
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.resolve import resolve
from tests.checks.contexts import TINY

CPU = Machine(num_cpus=2)
GPU = Machine(num_cpus=2, gpus=(Gpu(0), Gpu(1)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", dtype="bfloat16")


def write_model(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(TINY | {"max_position_embeddings": 2048} | values)
    )
    return folder


def specs_of(machine: Machine, **values: object) -> dict[str, EngineSpec]:
    resolved = resolve(LaunchConfig.model_validate(values), {"here": machine}, {})
    launch = resolved.after_conversion()
    return {engine.name: launch.engine_spec(engine) for engine in launch.engines}


def test_everything_is_derived_on_a_cpu(model: Path) -> None:
    spec = specs_of(CPU, model=str(model))["decode-0"]
    assert (spec.device, spec.device_indices, spec.num_threads) == ("cpu", (), 1)
    assert (spec.dtype, spec.max_model_len, spec.max_num_batched_tokens) == ("float32", 2048, 512)
    assert spec.kv_cache_memory == 1024**3
    assert spec.served_model_name == "tiny"
    assert not spec.enable_cumem_allocator
    assert not spec.async_scheduling, "a CPU that computes prepares nothing meanwhile"


def test_everything_is_derived_on_gpus(model: Path) -> None:
    specs = specs_of(GPU, model=str(model), enable_sleep_mode=True)
    spec = specs["decode-0"]
    assert (spec.device, spec.device_indices) == ("cuda", (1,))
    assert (spec.dtype, spec.max_num_batched_tokens, spec.kv_cache_memory) == (
        "bfloat16",
        8192,
        None,
    )
    assert spec.enable_cumem_allocator
    assert spec.async_scheduling
    specs = specs_of(GPU, model=str(model), decode={"async_scheduling": False})
    assert [specs[name].async_scheduling for name in ("prefill-0", "decode-0")] == [True, False]


@pytest.mark.parametrize(
    ("checkpoint", "has_native_bf16", "expected"),
    [
        ("bfloat16", False, "float32"),
        ("float16", False, "float32"),
        ("float32", False, "float32"),
        ("bfloat16", True, "bfloat16"),
        (None, True, "float32"),
    ],
)
def test_dtype_auto_on_a_cpu(
    tmp_path: Path, checkpoint: str | None, has_native_bf16: bool, expected: str
) -> None:
    model = write_model(tmp_path / "m", dtype=checkpoint)
    machine = Machine(num_cpus=1, has_native_bf16=has_native_bf16)
    assert specs_of(machine, model=str(model))["prefill-0"].dtype == expected


def test_sleep_mode_turns_the_allocator_on_for_its_role_alone(model: Path) -> None:
    specs = specs_of(GPU, model=str(model), decode={"enable_sleep_mode": True})
    assert specs["decode-0"].enable_cumem_allocator
    assert not specs["prefill-0"].enable_cumem_allocator
    specs = specs_of(GPU, model=str(model), enable_cumem_allocator=True)
    assert specs["prefill-0"].enable_cumem_allocator
    assert not specs["prefill-0"].enable_sleep_mode


def test_a_role_without_engines_needs_no_model(model: Path) -> None:
    specs = specs_of(CPU, model=str(model), decode={"replicas": 0, "model": "/no/such/model"})
    assert set(specs) == {"prefill-0"}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model": "smollm2"}, "smollm2"),
        ({"model": "/models/Qwen3-8B/"}, "Qwen3-8B"),
        ({"model": "/models/qwen.Q4_0.gguf"}, "qwen.Q4_0"),
        ({"model": "smollm2", "served_model_name": "mine"}, "mine"),
        ({"prefill": {"replicas": 0, "model": "a"}, "decode": {"model": "/models/b"}}, "b"),
    ],
)
def test_the_name_in_the_api(values: dict[str, object], name: str) -> None:
    resolved = resolve(LaunchConfig.model_validate(values), {"here": CPU}, {})
    assert resolved.served_model_name == name
