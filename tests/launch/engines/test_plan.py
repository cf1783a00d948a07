from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.plan import plan_processes
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import Plan
from pdlaunch.planning.resolve import ResolvedLaunch, resolve

CPU = Machine(num_cpus=8)
FOUR_GPUS = Machine(num_cpus=16, gpus=tuple(Gpu(index) for index in range(4)))


def config(**values: object) -> LaunchConfig:
    return LaunchConfig.model_validate(values)


def resolved(
    config: LaunchConfig, machine: Machine, environ: Mapping[str, str] | None = None
) -> ResolvedLaunch:
    """Resolve with models that are yet to be converted: no file is read."""
    pending = Model("smollm2", "/cache", pending="smollm2 is converted at the first start")
    models = dict.fromkeys(ROLES, pending)
    return resolve(config, {"local": machine}, environ or {}, models)


def plan(config: LaunchConfig, machine: Machine, environ: Mapping[str, str] | None = None) -> Plan:
    return plan_processes(resolved(config, machine, environ))


def test_one_prefill_and_one_decode_engine_are_five_processes() -> None:
    planned = plan(config(), CPU)
    assert [p.name for p in planned.processes] == [
        "prefill-0/rank-0",
        "decode-0/rank-0",
        "prefill-0",
        "decode-0",
        "router",
    ]
    assert planned.processes[0].command[2:] == (
        "-m",
        "pdlaunch.engine",
        "--name",
        "prefill-0/rank-0",
    )
    assert planned.processes[-1].ports == {"http": 8000}


def test_ranks_of_an_engine_are_one_unit_and_servers_are_their_own() -> None:
    planned = plan(config(prefill={"tensor_parallel_size": 2}), CPU)
    units = {p.name: p.unit for p in planned.processes}
    assert units["prefill-0/rank-0"] == units["prefill-0/rank-1"] != units["prefill-0"]


def test_gpus_are_dealt_round_robin_over_all_ranks() -> None:
    settings = config(
        prefill={"replicas": 1, "tensor_parallel_size": 2},
        decode={"replicas": 2, "tensor_parallel_size": 2},
    )
    planned = plan(settings, FOUR_GPUS)
    devices = [device for p in planned.processes if p.kind == "rank" for device in p.devices]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"]
    assert resolved(settings, FOUR_GPUS).engines[-1].device_indices == (0, 1)


@pytest.mark.parametrize(("num_cpus", "expected"), [(8, 2), (3, 1), (1, 1)])
def test_cores_are_shared_evenly_and_every_rank_gets_one(num_cpus: int, expected: int) -> None:
    settings = config(prefill={"replicas": 2}, decode={"tensor_parallel_size": 2})
    planned = plan(settings, Machine(num_cpus=num_cpus))
    ranks = [p for p in planned.processes if p.kind == "rank"]
    assert {rank.num_threads for rank in ranks} == {expected}
    assert {rank.environment["OMP_NUM_THREADS"] for rank in ranks} == {str(expected)}


def test_the_user_s_environment_and_the_engine_s_env_win() -> None:
    planned = plan(
        config(env={"UCX_MODULES": "all"}), CPU, {"NIXL_LOG_LEVEL": "INFO", "UCX_MODULES": "x"}
    )
    environment = planned.processes[0].environment
    assert environment["NIXL_LOG_LEVEL"] == "INFO"
    assert environment["UCX_MODULES"] == "all"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_no_rank_of_nixl_listens_whatever_ucx_tls_says() -> None:
    planned = plan(
        config(env={"UCX_TLS": "all"}, decode={"env": {"UCX_TLS": "tcp,cma,posix"}}),
        CPU,
        {"UCX_TLS": "tcp"},
    )
    transports = {
        p.name: p.environment.get("UCX_TLS") for p in planned.processes if p.kind == "rank"
    }
    assert transports == {"prefill-0/rank-0": "posix,cma,self", "decode-0/rank-0": "posix,cma"}


def test_secrets_are_masked_where_the_plan_is_shown() -> None:
    planned = plan(
        config(
            env={"HF_TOKEN": "hf_secret", "TOKENIZERS_PARALLELISM": "true"}, api_key="top-secret"
        ),
        CPU,
    )
    shown = msgspec.json.encode(planned.shown()).decode()
    assert "hf_secret" not in shown
    assert "top-secret" not in shown
    assert planned.shown().processes[0].environment["TOKENIZERS_PARALLELISM"] == "true"
    assert planned.processes[0].environment["HF_TOKEN"] == "hf_secret"


def test_conversions_are_guarded_children() -> None:
    planned = plan(config(), CPU)
    command = (
        "pdlaunch.protocol.process.guarded",
        "pdlaunch.engine.models.convert",
        "smollm2",
        "--if-needed",
        "--traceback",
    )
    assert planned.conversions[0].command[3:] == command


@pytest.mark.parametrize(
    ("values", "machine", "field"),
    [
        ({"prefill": {"replicas": 0}, "decode": {"replicas": 0}}, CPU, "prefill.replicas"),
        ({"device": "cuda"}, CPU, "device"),
        ({"decode": {"tensor_parallel_size": 8}}, FOUR_GPUS, "decode.tensor_parallel_size"),
    ],
)
def test_what_cannot_be_placed_is_a_config_error(
    values: dict[str, object], machine: Machine, field: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        resolved(config(**values), machine).require_startable()
    assert raised.value.field == field
    assert raised.value.fix
