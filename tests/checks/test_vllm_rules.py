import pytest

from pdlaunch.checks.registry import all_rules
from pdlaunch.checks.run import apply_rule
from pdlaunch.checks.vllm_rules import COUNTERPARTS
from pdlaunch.config.settings import all_settings
from pdlaunch.config.sources import OTHER_VARIABLES
from tests.checks.contexts import CPU, on


@pytest.mark.parametrize("theirs", COUNTERPARTS)
def test_each_counterpart_exists_and_is_named_without_the_value(theirs):
    ours = COUNTERPARTS[theirs]
    assert ours in all_settings() or ours in OTHER_VARIABLES
    (finding,) = apply_rule(all_rules()["PD121"], on(CPU, environ={theirs: "hunter2"}))
    assert finding.where == f"environment {theirs}"
    assert finding.message == f"{theirs} has no effect; it is {ours} here"
    assert "hunter2" not in repr(finding)


def test_the_fix_names_the_variable_of_the_setting():
    environ = {"VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "1", "VLLM_CACHE_ROOT": "/cache"}
    fixes = [finding.fix for finding in apply_rule(all_rules()["PD121"], on(CPU, environ=environ))]
    assert fixes == [
        "set PDLAUNCH_CACHE; unset VLLM_CACHE_ROOT",
        "set kv_transfer.lease_s, or PDLAUNCH_KV_TRANSFER__LEASE_S; "
        "unset VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
    ]


def test_the_others_are_one_line():
    environ = {f"VLLM_{letter}": "1" for letter in "ABCDEF"}
    (finding,) = apply_rule(all_rules()["PD122"], on(CPU, environ=environ))
    assert finding.message == "ignored: VLLM_A, VLLM_B, VLLM_C, VLLM_D and 2 more"
