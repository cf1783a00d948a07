from __future__ import annotations

import json
import shlex

import pytest

from pdlaunch.engines.plan import kind_of, plan_processes
from pdlaunch.errors import ConfigError
from tests.engines.test_plan import CPU, FOUR_GPUS, config, resolved


def commands(planned: object) -> dict[str, tuple[str, ...]]:
    return {p.name: p.command for p in planned.processes}  # type: ignore[attr-defined]


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
    plain = commands(plan_processes(resolved(config(engine="vllm"), CPU)))["prefill-0"]
    assert not {"--block-size", "--max-num-seqs", "--max-model-len"} & set(plain)
    settings = {"engine": "vllm", "block_size": 32, "max_num_seqs": 8, "max_model_len": 512}
    given = commands(plan_processes(resolved(config(**settings), CPU)))["prefill-0"]
    assert value_of(given, "--block-size") == "32"
    assert value_of(given, "--max-num-seqs") == "8"
    assert value_of(given, "--max-model-len") == "512"


def test_further_arguments_are_flags() -> None:
    arguments = {
        "enforce_eager": True,
        "enable-chunked-prefill": False,
        "seed": 3,
        "compilation-config": {"level": 0},
    }
    given = commands(plan_processes(resolved(config(engine="vllm", engine_args=arguments), CPU)))
    text = shlex.join(given["prefill-0"])
    assert "--enforce-eager" in text
    assert "--no-enable-chunked-prefill" in text
    assert "--seed 3" in text
    assert """--compilation-config '{"level":0}'""" in text


def test_engines_see_their_own_devices() -> None:
    launch = resolved(config(engine="vllm", tensor_parallel_size=2), FOUR_GPUS)
    environments = [p.environment for p in plan_processes(launch).processes[:2]]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0,1", "2,3"]
    assert all(e["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1" for e in environments)
    assert all("UCX_TLS" not in e for e in environments)


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="one kind") as caught:
        resolved(config(decode={"engine": "vllm"}), CPU).require_startable()
    assert caught.value.field == "engine"


def test_engines_of_both_roles_have_no_connector() -> None:
    launch = resolved(config(engine="vllm", both={"replicas": 2, "tensor_parallel_size": 2}), CPU)
    planned = plan_processes(launch)
    assert [p.name for p in planned.processes] == ["both-0", "both-1", "router"]
    assert not any(kind_of(launch).proves_pairs(p) for p in planned.processes)
    command = commands(planned)["both-1"]
    assert value_of(command, "--tensor-parallel-size") == "2"
    assert "--kv-transfer-config" not in command
