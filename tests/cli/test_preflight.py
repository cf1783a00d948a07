"""The rehearsal of ``check-config --probe``."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pdlaunch.cli import preflight
from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.launch import LaunchOutcome
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.resolve import ResolvedLaunch, resolve


def test_it_takes_no_fixed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment that runs may have them."""
    planned: list[ResolvedLaunch] = []

    def launch(plan: ResolvedLaunch, *_: Any, **__: Any) -> LaunchOutcome:
        planned.append(plan)
        return LaunchOutcome(None, ("no launch",), was_ready=False, stop_signal=None)

    monkeypatch.setattr(preflight, "launch", launch)
    ports = {"port": 9000, "prefill": {"port": 9001}, "decode": {"port": 9002}}
    config = LaunchConfig.model_validate({"engine_api_key": "k", "device": "cpu", **ports})
    pairs = preflight.probe_transport(resolve(config, {"here": probe_machine()}, os.environ))
    assert pairs[0].error == "no launch"
    (plan,) = planned
    assert (plan.config.port, plan.config.prefill.port, plan.config.decode.port) == (0, 0, 0)
