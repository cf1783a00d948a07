"""Collects the rules of all families."""

from __future__ import annotations

from types import ModuleType

from pdlaunch.checks import (
    allocator_rules,
    config_rules,
    deployment_rules,
    engine_args_rules,
    engine_pair_rules,
    engine_rules,
    engine_variables_rules,
    fabric_rules,
    far_pair_rules,
    kv_cache_rules,
    library_rules,
    machine_rules,
    memory_rules,
    mooncake_rules,
    network_rules,
    offload_rules,
    pair_model_rules,
    pair_rules,
    placement_rules,
    timeout_rules,
    transport_rules,
    ucx_rules,
    vllm_rules,
)
from pdlaunch.checks.rule import Rule

# A rule takes a number of its family that none has: reports name rules by it, in CI and elsewhere.
# ``docs/rules.md`` lists them in order; modules follow subjects, and share the tens of a family.
FAMILIES = {
    "PD1": "Configuration",
    "PD2": "Memory",
    "PD3": "Prefill and decode pairs",
    "PD4": "Environment",
    "PD5": "Transport",
    "PD6": "Other engines",
}


def all_rules() -> dict[str, Rule]:
    """Return every rule, in the order of the codes."""
    modules: tuple[ModuleType, ...] = (
        config_rules,
        timeout_rules,
        vllm_rules,
        memory_rules,
        allocator_rules,
        kv_cache_rules,
        offload_rules,
        pair_model_rules,
        pair_rules,
        placement_rules,
        library_rules,
        machine_rules,
        mooncake_rules,
        ucx_rules,
        fabric_rules,
        far_pair_rules,
        network_rules,
        transport_rules,
        engine_args_rules,
        engine_rules,
        engine_pair_rules,
        engine_variables_rules,
        deployment_rules,
    )
    rules = [
        value for module in modules for value in vars(module).values() if isinstance(value, Rule)
    ]
    # Sorted here, as rules of one family stand in several modules.
    by_code = {rule.code: rule for rule in sorted(rules, key=lambda rule: rule.code)}
    assert len(by_code) == len(rules), "two rules share a code"
    return by_code


def family(rule: Rule) -> str:
    """Return the name of the rule's family."""
    return FAMILIES[rule.code[:3]]
