"""Findings name the setting that the user gave, and fixes that work in that set-up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checks.contexts import GPU
from tests.checks.fires_engines import TWO_VERSIONS
from tests.checks.fires_memory import ONE_GPU
from tests.checks.firing import Setup, check_config, write_models

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ON_MOONCAKE = ("--kv-connector", "mooncake")
PATH_NIXL = "kv_transfer: {nixl: {path: nixl}}\n"
CASES = {
    "segments under mooncake": (
        "PD204",
        Setup(environ=EXPANDABLE, flags=ON_MOONCAKE, machine=GPU),
        "environment PYTORCH_CUDA_ALLOC_CONF",
        "take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF, or use "
        "--enable-cumem-allocator or --enable-sleep-mode",
    ),
    "caches of given sizes": (
        "PD210",
        Setup("kv_cache_memory: 90GiB\ngpu_memory_utilization: 0.3\n", machine=ONE_GPU),
        "kv_cache_memory",
        "lower kv_cache_memory of prefill and kv_cache_memory of decode, or use fewer engines",
    ),
    "a cache beside a share": (
        "PD210",
        Setup("decode: {kv_cache_memory: 90GiB}\n", machine=ONE_GPU),
        "decode.kv_cache_memory",
        "lower gpu_memory_utilization of prefill and kv_cache_memory of decode, or use fewer "
        "engines",
    ),
    "sleep over a path": (
        "PD213",
        Setup(f"enable_sleep_mode: true\n{PATH_NIXL}", machine=GPU),
        "enable_sleep_mode",
        "let kv_transfer.nixl.path be auto or p2p, switch enable_sleep_mode off, or give the host "
        "an IMEX channel",
    ),
    "pools under mooncake": (
        "PD213",
        Setup("enable_cumem_allocator: true\n", flags=ON_MOONCAKE, machine=GPU),
        "enable_cumem_allocator",
        "use connector nixl, switch enable_cumem_allocator off, or give the host an IMEX channel",
    ),
    "one side sleeps": (
        "PD313",
        Setup(f"decode: {{enable_sleep_mode: true}}\n{PATH_NIXL}", machine=GPU),
        "decode.enable_sleep_mode",
        "",
    ),
    "ranks of prefill": (
        "PD307",
        Setup("prefill: {tensor_parallel_size: 3}\ntensor_parallel_size: 2\n", machine=GPU),
        "prefill.tensor_parallel_size",
        "",
    ),
    "ranks of prefill with vLLM": (
        "PD626",
        Setup(
            "engine: vllm\nprefill: {tensor_parallel_size: 3}\ntensor_parallel_size: 2\n",
            machine=GPU,
        ),
        "prefill.tensor_parallel_size",
        "",
    ),
    "name of prefill's model with vLLM": (
        "PD620",
        Setup("engine: vllm\nprefill: {model: tiny-copy}\n"),
        "prefill.model",
        "",
    ),
    "version of prefill's vLLM": (
        "PD612",
        Setup(
            "engine: vllm\nengine_command: first/bin/vllm\n"
            "prefill: {engine_command: second/bin/vllm}\n",
            machine=None,
            arrange=TWO_VERSIONS,
        ),
        "prefill.engine_command",
        "",
    ),
    "shape of prefill's model": (
        "PD301",
        Setup("prefill: {model: tiny-deep}\n"),
        "prefill.model",
        "",
    ),
    "folder of prefill's model": (
        "PD302",
        Setup("prefill: {model: tiny-copy}\n"),
        "prefill.model",
        "",
    ),
    "KV heads of decode's model": (
        "PD306",
        Setup("decode: {model: tiny-4-kv-heads}\n"),
        "decode.model",
        "",
    ),
    "defaults of prefill's model": (
        "PD315",
        Setup("prefill: {model: tiny-warm}\n"),
        "prefill.model",
        "",
    ),
}
"""Rule, set-up, the place that the finding names, and its fix where that is not the page's."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_finding_names_what_the_user_gave(models: Path, name: str) -> None:
    rule, setup, place, fix = CASES[name]
    found = [each for each in check_config(setup, models)["findings"] if each["rule"] == rule]
    # Some rules speak of each role that the same setting is wrong for.
    assert {each["where"].partition(" (")[0] for each in found} == {place}
    if fix:
        assert {each["fix"] for each in found} == {fix}
