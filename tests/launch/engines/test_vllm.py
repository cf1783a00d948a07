"""What vLLM is started with, and what is expected of it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.checks.run import all_rules
from pdlaunch.launch.engines import OF_RUNNING_ENGINES, kind_of, plan_processes
from pdlaunch.planning.resolve import effective_engines
from tests.launch.engines.test_plan import CPU, FOUR_GPUS, config, resolved


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


def transfer_of(command: tuple[str, ...]) -> dict[str, Any]:
    transfer: dict[str, Any] = json.loads(value_of(command, "--kv-transfer-config"))
    return transfer


def command(name: str, machine: object = CPU, **settings: object) -> tuple[str, ...]:
    planned = plan_processes(resolved(config(engine="vllm", **settings), machine))
    (found,) = [process.command for process in planned.processes if process.name == name]
    return found


def test_each_engine_is_a_sidecar_with_the_command_of_vllm() -> None:
    launch = resolved(config(engine="vllm", decode={"replicas": 2}), CPU)
    processes, kind = plan_processes(launch).processes, kind_of(launch)
    assert kind.name == "vllm"
    assert [(each.name, kind.proves_pairs(each)) for each in processes] == [
        ("prefill-0", False),
        ("decode-0", True),
        ("decode-1", True),
        ("router", False),
    ]
    decode = processes[2]
    at = decode.command.index("--")
    assert decode.command[at + 2 : at + 4] == ("serve", "/cache")
    assert value_of(decode.command, "--served-model-name") == "smollm2"
    assert transfer_of(decode.command) == {
        "kv_connector": "PdlaunchConnector",
        "kv_connector_module_path": "pdlaunch.vllm.connector",
        "kv_connector_extra_config": {},
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }


def test_a_host_tier_stands_behind_our_connector_and_its_flag_is_gone() -> None:
    given = command("decode-0", engine_args={"kv_offloading_size": 1.5, "seed": 3})
    transfer = transfer_of(given)
    assert transfer["kv_connector"] == "MultiConnector"
    assert transfer["kv_load_failure_policy"] == "recompute"
    ours, tier = transfer["kv_connector_extra_config"]["connectors"]
    assert (ours["kv_connector"], tier["kv_connector"]) == (
        "PdlaunchConnector",
        "OffloadingConnector",
    )
    assert tier["kv_connector_extra_config"] == {"cpu_bytes_to_use": 3 * 2**29}
    assert value_of(given, "--seed") == "3"
    assert not any("offloading" in each for each in given if each.startswith("--"))


def test_settings_mean_what_they_mean_for_native_engines_and_unset_ones_are_left_out() -> None:
    settings = {
        "block_size": 32,
        "max_num_seqs": 8,
        "max_model_len": 512,
        "drain_timeout_s": 7,
        "enable_cumem_allocator": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "load_format": "dummy",
        "kv_cache_memory": "2GiB",
        "gpu_memory_utilization": 0.5,
        "kv_transfer": {"connector": "vllm-nixl", "lease_s": 12, "on_failure": "fail"},
    }
    given = command("decode-0", FOUR_GPUS, **settings)
    values = {
        "--block-size": "32",
        "--max-num-seqs": "8",
        "--max-model-len": "512",
        "--load-format": "dummy",
        "--kv-cache-memory-bytes": str(2 << 30),
        "--gpu-memory-utilization": "0.5",
    }
    assert {flag: value_of(given, flag) for flag in values} == values
    assert value_of(given, "--shutdown-timeout") == "7"
    switches = {"--enable-cumem-allocator", "--enforce-eager", "--no-enable-prefix-caching"}
    assert switches | {"--no-async-scheduling"} <= set(given)
    transfer = transfer_of(given)
    assert transfer["kv_connector"] == "NixlConnector"
    assert transfer["kv_buffer_device"] == "cuda"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector_extra_config"] == {"kv_lease_duration": 12}
    assert not {*values, *switches, "--no-async-scheduling"} & set(command("decode-0"))


def test_further_arguments_are_flags() -> None:
    arguments = {
        "enable_lora": True,
        "dcp": 2,
        "enable-chunked-prefill": False,
        "cc": {"level": 0},
        "lora-modules": ["a=/a", {"name": "b", "path": "/b"}],
    }
    text = shlex.join(command("prefill-0", engine_args=arguments))
    assert "--enable-lora --decode-context-parallel-size 2 --no-enable-chunked-prefill" in text
    assert """--compilation-config '{"level":0}'""" in text
    assert """--lora-modules a=/a '{"name":"b","path":"/b"}'""" in text


def test_engines_see_their_own_devices_and_dev_mode_is_on_for_sleep_alone() -> None:
    for sleeps in (False, True):
        settings = config(engine="vllm", tensor_parallel_size=2, enable_sleep_mode=sleeps)
        prefill, decode, _ = plan_processes(resolved(settings, FOUR_GPUS)).processes
        devices = [each.environment["CUDA_VISIBLE_DEVICES"] for each in (prefill, decode)]
        assert devices == ["0,1", "2,3"]
        assert prefill.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
        assert prefill.environment["VLLM_SERVER_DEV_MODE"] == str(int(sleeps))
        assert ("--enable-sleep-mode" in prefill.command) is sleeps


def test_rules_on_engines_that_run_already_are_not_for_launches() -> None:
    codes = {rule.code for rule in kind_of(resolved(config(engine="vllm"), CPU)).rules()}
    assert {code for code in all_rules() if code.startswith("PD6")} - codes == OF_RUNNING_ENGINES
    assert "PD220" not in codes
    assert codes >= {"PD103", "PD107", "PD212", "PD303", "PD410", "PD420", "PD504"}


def test_engines_of_both_roles_have_no_connector() -> None:
    given = command("both-1", both={"replicas": 2, "tensor_parallel_size": 2})
    assert value_of(given, "--tensor-parallel-size") == "2"
    assert "--kv-transfer-config" not in given


@pytest.mark.parametrize(
    ("transfer", "reason", "variables"),
    [
        ({}, "", {"UCX_TLS": "posix,cma,self"}),
        ({"verify": False}, "kv_transfer.verify is off", {"UCX_TLS": "posix,cma,self"}),
        ({"connector": "mooncake"}, "", {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}),
        ({"connector": "vllm-nixl"}, "kv_transfer.connector is vllm-nixl", {}),
    ],
)
def test_engines_have_our_connector_unless_vllms_own_is_asked_for(
    transfer: dict[str, object], reason: str, variables: dict[str, str]
) -> None:
    launch = resolved(config(engine="vllm", kv_transfer=transfer), CPU)
    is_ours = transfer.get("connector") != "vllm-nixl"
    for process in plan_processes(launch).processes[:2]:
        given = transfer_of(process.command)
        assert given["kv_connector"] == ("PdlaunchConnector" if is_ours else "NixlConnector")
        assert ("kv_connector_module_path" in given) is is_ours
        assert (value_of(process.command, "--unverified") if reason else "") == reason
        names = ("UCX_TLS", "MC_TCP_BIND_ADDRESS")
        environment = process.environment
        assert {name: environment[name] for name in names if name in environment} == variables
    shown = effective_engines(launch)["decode"]["kv_blocks_verified"]
    assert shown == (f"no: {reason}" if reason else "yes")


def test_the_largest_batch_is_known_when_it_is_set() -> None:
    given = {"data_parallel_size": 2, "max_num_seqs": 32}
    for settings, known in ({}, 0), ({"prefill": {"max_num_seqs": 8}}, 8), (given, 64):
        launch = resolved(config(engine="vllm", **settings), CPU)
        processes = plan_processes(launch).processes
        server = next(each for each in processes if each.role == "prefill")
        assert kind_of(launch).capabilities(server, None).max_num_seqs == known


@pytest.mark.parametrize("arguments", [{}, {"reasoning_parser": "qwen3"}])
def test_what_it_can_do_follows_from_lease_and_arguments(arguments: dict[str, str]) -> None:
    settings = config(engine="vllm", engine_args=arguments, kv_transfer={"lease_s": 12})
    launch = resolved(settings, CPU)
    can = kind_of(launch).capabilities(plan_processes(launch).processes[1], None)
    assert (can.kind, can.takes_launch_token) == ("vllm", False)
    assert can.lease_s == 12
    assert can.splits_reasoning == bool(arguments)
