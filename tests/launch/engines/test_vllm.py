from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from pdlaunch.checks.run import all_rules
from pdlaunch.launch.engines.plan import kind_of, plan_processes
from pdlaunch.launch.engines.vllm import OF_RUNNING_ENGINES
from pdlaunch.planning.effective import effective_engines, effective_settings
from tests.launch.engines.test_plan import CPU, FOUR_GPUS, config, resolved


def commands(planned: object) -> dict[str, tuple[str, ...]]:
    return {p.name: p.command for p in planned.processes}  # type: ignore[attr-defined]


def installed(root: Path, version: str) -> str:
    """Make an environment as far as its executable and the metadata of vLLM go."""
    script = root / "bin" / "vllm"
    info = root / "lib" / "python3.11" / "site-packages" / f"vllm-{version}.dist-info"
    for folder in (script.parent, info):
        folder.mkdir(parents=True)
    script.write_text(f"#!{root}/bin/python\n")
    script.chmod(0o755)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(script)


def value_of(command: tuple[str, ...], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_each_engine_is_a_sidecar_with_the_command_of_vllm() -> None:
    launch = resolved(config(engine="vllm", decode={"replicas": 2}), CPU)
    planned = plan_processes(launch)
    assert [p.name for p in planned.processes] == ["prefill-0", "decode-0", "decode-1", "router"]
    assert kind_of(launch).name == "vllm"
    assert [kind_of(launch).proves_pairs(p) for p in planned.processes] == [
        False,
        True,
        True,
        False,
    ]
    command = commands(planned)["decode-1"]
    at = command.index("--")
    assert command[at + 2 : at + 4] == ("serve", "/cache")
    assert value_of(command, "--served-model-name") == "smollm2"
    transfer = json.loads(value_of(command, "--kv-transfer-config"))
    assert transfer["kv_connector"] == "NixlConnector"
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert transfer["kv_connector_extra_config"] == {"kv_lease_duration": 30}


def test_only_what_is_set_is_handed_on() -> None:
    sizes = {
        "block_size": 32,
        "max_num_seqs": 8,
        "max_model_len": 512,
    }
    flags = {name: "--" + name.replace("_", "-") for name in sizes}
    plain = commands(plan_processes(resolved(config(engine="vllm"), CPU)))["prefill-0"]
    assert not {*flags.values()} & {*plain}
    given = commands(plan_processes(resolved(config(engine="vllm", **sizes), CPU)))["prefill-0"]
    assert {name: int(value_of(given, flag)) for name, flag in flags.items()} == sizes


def test_settings_mean_what_they_mean_for_native_engines() -> None:
    settings = {
        "drain_timeout_s": 7,
        "enable_cumem_allocator": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "load_format": "dummy",
        "kv_cache_memory": "2GiB",
        "gpu_memory_utilization": 0.5,
        "kv_transfer": {"lease_s": 12, "on_failure": "fail"},
    }
    planned = plan_processes(resolved(config(engine="vllm", **settings), FOUR_GPUS))
    command = commands(planned)["decode-0"]
    text = shlex.join(command)
    assert "--shutdown-timeout 7 " in text
    assert "--load-format dummy " in text
    assert "--gpu-memory-utilization 0.5 " in text
    assert f"--kv-cache-memory-bytes {2 << 30} " in text
    switches = {"--enable-cumem-allocator", "--enforce-eager", "--no-enable-prefix-caching"}
    assert switches | {"--no-async-scheduling"} <= set(command)
    transfer = json.loads(value_of(command, "--kv-transfer-config"))
    assert transfer["kv_buffer_device"] == "cuda"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector_extra_config"] == {"kv_lease_duration": 12}


def test_further_arguments_are_flags() -> None:
    arguments = {
        "enable_lora": True,
        "enable-expert-parallel": True,
        "dcp": 2,
        "enable-chunked-prefill": False,
        "seed": 3,
        "cc": {"level": 0},
        "lora-modules": ["a=/a", {"name": "b", "path": "/b"}],
    }
    given = commands(plan_processes(resolved(config(engine="vllm", engine_args=arguments), CPU)))
    text = shlex.join(given["prefill-0"])
    assert "--enable-lora --enable-expert-parallel --decode-context-parallel-size 2 " in text
    assert "--no-enable-chunked-prefill" in text
    assert "--seed 3" in text
    assert """--compilation-config '{"level":0}'""" in text
    assert """--lora-modules a=/a '{"name":"b","path":"/b"}'""" in text


def test_dev_mode_is_on_for_sleep_alone() -> None:
    for sleeps, value in ((False, "0"), (True, "1")):
        launch = resolved(config(engine="vllm", enable_sleep_mode=sleeps), FOUR_GPUS)
        prefill = plan_processes(launch).processes[0]
        assert prefill.environment["VLLM_SERVER_DEV_MODE"] == value
        assert ("--enable-sleep-mode" in prefill.command) is sleeps


def test_effective_values_are_what_vllm_is_given() -> None:
    settings = {"engine": "vllm", "kv_cache_memory": "2.5GiB", "decode": {"block_size": 64}}
    launch = resolved(config(**settings), CPU)
    shown = effective_engines(launch)
    assert [shown[role]["block_size"] for role in ("prefill", "decode")] == [None, 64]
    prefill = shown["prefill"]
    assert prefill["max_num_batched_tokens"] is None
    assert prefill["async_scheduling"] is None
    assert prefill["kv_cache_memory"] == 2 << 30
    assert prefill["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "num_blocks" not in (prefill["memory_of_a_rank"] or {})
    names = {value.path for value in effective_settings(launch)}
    assert not names & {"prefill.max_num_batched_tokens", "prefill.async_scheduling"}


def test_engines_see_their_own_devices() -> None:
    launch = resolved(config(engine="vllm", tensor_parallel_size=2), FOUR_GPUS)
    environments = [p.environment for p in plan_processes(launch).processes[:2]]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0,1", "2,3"]
    assert all(e["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1" for e in environments)
    assert all("UCX_TLS" not in e for e in environments)


def test_rules_on_engines_that_run_already_are_not_for_launches() -> None:
    codes = {rule.code for rule in kind_of(resolved(config(engine="vllm"), CPU)).rules()}
    assert {code for code in all_rules() if code.startswith("PD6")} - codes == OF_RUNNING_ENGINES
    assert not codes & {"PD110", "PD304", "PD402", "PD504"}
    assert codes >= {"PD103", "PD212", "PD303", "PD410", "PD420", "PD501"}


def test_engines_of_both_roles_have_no_connector() -> None:
    launch = resolved(config(engine="vllm", both={"replicas": 2, "tensor_parallel_size": 2}), CPU)
    planned = plan_processes(launch)
    assert [p.name for p in planned.processes] == ["both-0", "both-1", "router"]
    assert not any(kind_of(launch).proves_pairs(p) for p in planned.processes)
    command = commands(planned)["both-1"]
    assert value_of(command, "--tensor-parallel-size") == "2"
    assert "--kv-transfer-config" not in command


def test_an_engine_that_can_be_verified_has_our_connector(tmp_path: Path) -> None:
    command = installed(tmp_path, "0.32.4")
    launch = resolved(config(engine="vllm", engine_command=command), CPU)
    prefill, decode, _ = plan_processes(launch).processes
    for process in (prefill, decode):
        transfer = json.loads(value_of(process.command, "--kv-transfer-config"))
        assert transfer["kv_connector"] == "VerifiedNixlConnector"
        assert transfer["kv_connector_module_path"] == "pdlaunch.vllm.connector"
        assert process.environment["UCX_TLS"] == "posix,cma,self"
        assert "--unverified" not in process.command
    assert effective_engines(launch)["decode"]["kv_blocks_verified"] == "yes"


@pytest.mark.parametrize(
    ("version", "settings", "reason"),
    [
        ("0.31.2", {}, "it is vLLM 0.31.2, and 0.32 can be verified"),
        ("0.33.0", {}, "it is vLLM 0.33.0, and 0.32 can be verified"),
        ("0.32.0", {"kv_transfer": {"verify": False}}, "kv_transfer.verify is off"),
        (
            "0.32.0",
            {"engine_args": {"speculative_config.method": "ngram"}},
            "engine_args has speculative_config.method",
        ),
        (
            "0.32.0",
            {"prefill": {"engine_command": "/no/vllm"}},
            "the version of /no/vllm is not known",
        ),
    ],
)
def test_one_that_cannot_has_the_stock_connector_and_says_why(
    tmp_path: Path, version: str, settings: dict[str, object], reason: str
) -> None:
    command = installed(tmp_path, version)
    launch = resolved(config(engine="vllm", engine_command=command, **settings), CPU)
    prefill, decode, _ = plan_processes(launch).processes
    for process in (prefill, decode):
        transfer = json.loads(value_of(process.command, "--kv-transfer-config"))
        assert transfer["kv_connector"] == "NixlConnector"
        assert "kv_connector_module_path" not in transfer
        assert value_of(process.command, "--unverified") == reason
        assert "UCX_TLS" not in process.environment
    assert effective_engines(launch)["decode"]["kv_blocks_verified"] == f"no: {reason}"


@pytest.mark.parametrize("arguments", [{}, {"reasoning_parser": "qwen3"}])
def test_what_it_can_do_follows_from_lease_and_arguments(arguments: dict[str, str]) -> None:
    settings = config(engine="vllm", engine_args=arguments, kv_transfer={"lease_s": 12})
    launch = resolved(settings, CPU)
    can = kind_of(launch).capabilities(plan_processes(launch).processes[1], None)
    assert (can.kind, can.needs_proof, can.takes_launch_token) == ("vllm", True, False)
    assert can.lease_s == 12
    assert can.splits_reasoning == bool(arguments)
