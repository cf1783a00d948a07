"""Processes of native engines, the router and conversions, as they are planned."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pdlaunch.checks.run import all_rules
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.launch.engines.plan import kind_of, plan_processes
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import Plan, ProcessSpec
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


def plan(
    machine: Machine = CPU, environ: Mapping[str, str] | None = None, **values: object
) -> Plan:
    return plan_processes(resolved(config(**values), machine, environ))


def ranks(planned: Plan) -> list[ProcessSpec]:
    return [process for process in planned.processes if process.kind == "rank"]


def test_the_user_s_environment_and_the_engine_s_env_win() -> None:
    environ = {"NIXL_LOG_LEVEL": "INFO", "UCX_MODULES": "x"}
    environment = plan(environ=environ, env={"UCX_MODULES": "all"}).processes[0].environment
    assert environment["NIXL_LOG_LEVEL"] == "INFO"
    assert environment["UCX_MODULES"] == "all"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_no_rank_of_nixl_listens_whatever_ucx_tls_says_and_one_without_peers_has_no_nixl() -> None:
    planned = plan(
        environ={"UCX_TLS": "tcp"},
        env={"UCX_TLS": "all"},
        decode={"env": {"UCX_TLS": "tcp,cma,posix"}},
    )
    transports = [rank.environment["UCX_TLS"] for rank in ranks(planned)]
    assert transports == ["posix,cma,self", "posix,cma"]
    for rank in ranks(plan(both={"replicas": 1}, prefill={"replicas": 1})):
        names = [name for name in rank.environment if name.startswith(("UCX", "NIXL"))]
        assert bool(names) is (rank.role != "both")


def test_secrets_are_masked_where_the_plan_is_shown() -> None:
    env = {"HF_TOKEN": "hf_secret", "TOKENIZERS_PARALLELISM": "true"}
    planned = plan(env=env, api_key="top-secret")
    shown = msgspec.json.encode(planned.shown()).decode()
    assert "hf_secret" not in shown
    assert "top-secret" not in shown
    assert planned.shown().processes[0].environment["TOKENIZERS_PARALLELISM"] == "true"
    assert planned.processes[0].environment["HF_TOKEN"] == "hf_secret"


def test_the_decode_ranks_prove_the_pairs_and_rules_on_other_engines_say_nothing() -> None:
    launch = resolved(config(decode={"tensor_parallel_size": 2}), CPU)
    kind = kind_of(launch)
    proving = [p.name for p in plan_processes(launch).processes if kind.proves_pairs(p)]
    assert proving == ["decode-0/rank-0", "decode-0/rank-1"]
    others = {code for code in all_rules() if code.startswith("PD6")} - {"PD610", "PD614", "PD615"}
    assert {rule.code for rule in kind.rules()} == all_rules().keys() - others
