"""The supervisor, the router and the checks learn of native engines what they need."""

from __future__ import annotations

import json
from pathlib import Path

from pdlaunch.checks.run import all_rules
from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.engines.plan import kind_of, plan_processes
from pdlaunch.machine.facts import Machine
from pdlaunch.planning.resolve import ResolvedLaunch, resolve

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


def resolved(folder: Path, **values: object) -> ResolvedLaunch:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = LaunchConfig.model_validate({"model": str(folder), **values})
    return resolve(config, {"local": Machine(num_cpus=2)}, {})


def test_the_decode_ranks_prove_the_pairs(tmp_path: Path) -> None:
    launch = resolved(tmp_path, decode={"tensor_parallel_size": 2})
    kind = kind_of(launch)
    proving = [p.name for p in plan_processes(launch).processes if kind.proves_pairs(p)]
    assert proving == ["decode-0/rank-0", "decode-0/rank-1"]


def test_rules_on_other_engines_say_nothing_of_native_ones() -> None:
    others = {code for code in all_rules() if code.startswith("PD6")} - {"PD610", "PD615"}
    assert {rule.code for rule in NativeEngine().rules()} == all_rules().keys() - others


def test_a_rank_without_peers_has_no_variables_of_a_connector(tmp_path: Path) -> None:
    launch = resolved(tmp_path, both={"replicas": 1}, prefill={"replicas": 1})
    with_ucx = {
        role: sorted(name for name in engines.environment if name.startswith(("UCX", "NIXL")))
        for role, engines in launch.roles.items()
    }
    assert with_ucx["both"] == []
    assert with_ucx["prefill"] == with_ucx["decode"] != []
