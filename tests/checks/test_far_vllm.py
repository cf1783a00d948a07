"""What rules find of executables of engines that run on other hosts, as their agents tell them."""

from dataclasses import replace
from pathlib import Path

import pytest

from pdlaunch.checks.probed import probe_launch
from pdlaunch.checks.run import run_checks
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.machine.host import EngineCommand
from pdlaunch.planning.resolve import ResolvedLaunch, resolve_on
from tests.checks.cases_of_placement import TRUSTED, far_vllm
from tests.launch.engines.test_vllm import installed

V32 = EngineCommand(version="0.32.0")
Told = dict[str, EngineCommand] | None


def launch_on(a: Told, b: Told, **config: object) -> ResolvedLaunch:
    """Prefill on a, decode on b; ``a``, ``b``: what their agents tell, None: they did not join."""
    launch = far_vllm(**(TRUSTED | config)).launch
    here, *others = launch.hosts
    told = [replace(host, executables=each) for host, each in zip(others, (a, b), strict=True)]
    models = {role: engines.model for role, engines in launch.roles.items()}
    return resolve_on(launch.config, [here, *told], {}, models)


def findings(launch: ResolvedLaunch, *codes: str) -> list[str]:
    report = run_checks(
        launch, {}, probe_launch(launch, with_ports=False), rules=kind_of(launch).rules()
    )
    return [f"{each.rule} {each.message}" for each in report.findings if each.rule in codes]


NOT_ALLOWED = "vllm: its agent does not allow it: start that with --allow-executable vllm"


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ({"vllm": V32}, {"vllm": V32}, []),
        (None, None, []),
        ({"vllm": V32}, {"other": V32}, [f"PD611 on b: {NOT_ALLOWED}"]),
        (
            {"vllm": V32},
            {"vllm": EngineCommand(version="0.31.1")},
            ["PD612 prefill is vLLM 0.32.0, decode vLLM 0.31.1"],
        ),
    ],
)
def test_what_agents_tell_of_executables_is_judged(a: Told, b: Told, found: list[str]) -> None:
    assert findings(launch_on(a, b), "PD611", "PD612", "PD613") == found


def test_what_is_installed_beside_the_supervisor_says_nothing_of_others(tmp_path: Path) -> None:
    command = installed(tmp_path, "0.23.0")
    launch = launch_on({"vllm": V32}, {"vllm": V32}, engine_command=command)
    assert not findings(launch, "PD611", "PD612", "PD613")


def test_nothing_opens_where_the_network_is_not_trusted() -> None:
    launch = launch_on({"vllm": V32}, {"vllm": V32}, kv_transfer__trusted_network=False)
    environment = plan_processes(launch).processes[0].environment
    assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert "UCX_NET_DEVICES" not in environment
