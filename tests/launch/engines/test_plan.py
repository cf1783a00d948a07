"""Processes of native engines, the router and conversions, as they are planned."""

from collections.abc import Mapping

from pdlaunch.checks.run import all_rules
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.models import Model
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


def test_the_user_s_environment_and_the_engine_s_env_win() -> None:
    environ = {"NIXL_LOG_LEVEL": "INFO", "UCX_MODULES": "x"}
    given = config(env={"UCX_MODULES": "all"}, decode={"env": {"UCX_MODULES": "sm"}})
    planned = plan_processes(resolved(given, CPU, environ))
    found = [each.environment for each in planned.processes if each.kind == "rank"]
    assert [each["UCX_MODULES"] for each in found] == ["all", "sm"]
    assert found[0]["NIXL_LOG_LEVEL"] == "INFO"
    assert found[0]["HF_HUB_OFFLINE"] == "1"


def test_the_decode_ranks_prove_the_pairs_and_rules_on_other_engines_say_nothing() -> None:
    launch = resolved(config(decode={"tensor_parallel_size": 2}), CPU)
    kind = kind_of(launch)
    proving = [p.name for p in plan_processes(launch).processes if kind.proves_pairs(p)]
    assert proving == ["decode-0/rank-0", "decode-0/rank-1"]
    others = {code for code in all_rules() if code.startswith("PD6")} - {"PD610", "PD614", "PD615"}
    assert {rule.code for rule in kind.rules()} == all_rules().keys() - others
